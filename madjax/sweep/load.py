"""What work takes, told from shapes alone: operations, and bytes on a device.

Operations are floating-point ones: two for each product of two numbers in a product of matrices or
a convolution, which are nearly all that networks compute.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import Mesh

from madjax import backend
from madjax.attacks import Attack, Online
from madjax.batching import bytes_of, inside
from madjax.config import Defended, Task
from madjax.datasets import Dataset
from madjax.defenses import Defense
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.recipe import Recipe, cross_entropy, mean_gradient, trainable
from madjax.sweep import stages
from madjax.sweep.cache import in_bytes
from madjax.sweep.mesh import one_by_one, wave_size
from madjax.sweep.stages import Own, Parties, Point, Unseen
from madjax.sweep.tasks import Opened
from madjax.sweep.work import Group
from madjax.train import check_parts, start

_SEVERAL = 8
"""Images in the programs whose operations are counted."""


def knowing(network: Classifier) -> float:
    """Operations for a network's posterior of one image."""
    return _knowing(network, backend.platform())


@lru_cache(maxsize=128)
def _knowing(network: Classifier, platform: str) -> float:
    with backend.traced_for(platform):
        return _operations(network.posterior, _shapes(network), _images(network, _SEVERAL))


def learning(network: Classifier) -> float:
    """Operations for the gradient of one example."""
    return _learning(network, backend.platform())


@lru_cache(maxsize=128)
def _learning(network: Classifier, platform: str) -> float:
    def gradient(params: Any, images: Any) -> Any:
        return jax.grad(partial(_loss, network, params))(trainable(params), images)

    with backend.traced_for(platform):
        return _operations(gradient, _shapes(network), _images(network, _SEVERAL))


def answering(rule: Defense, network: Classifier, known: Any) -> float:
    """Operations for what a defence has to know of one query; known may be shapes.

    What it makes of that at each strength is not counted: no network is asked there.
    """
    evidence = partial(rule.evidence, network.apply)
    return _operations(evidence, known, _images(network, _SEVERAL))


def collecting(attack: Attack, stolen: Classifier) -> float:
    """Operations of an attacker's own for each query: it trains substitutes, and makes images."""
    return attack.passes * knowing(stolen) / attack.budget


def _operations(function: Callable[..., Any], *shapes: Any) -> float:
    """Of a program, for each of its `_SEVERAL` images."""
    return _counted(jax.make_jaxpr(function)(*shapes).jaxpr) / _SEVERAL


def _counted(jaxpr: Jaxpr) -> float:
    """Of all products in a program; a loop counts as often as it runs, where that is known."""
    total = 0.0
    for equation in jaxpr.eqns:
        within = [_counted(each) for each in inside(equation)]
        if equation.primitive.name == "cond":
            total += max(within)
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * sum(within) + _products(equation)
    return total


def _products(equation: JaxprEqn) -> float:
    """Operations of one equation, without what is inside it."""
    shapes = [variable.aval.shape for variable in equation.invars if hasattr(variable, "aval")]
    made = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
    if equation.primitive.name == "dot_general":
        (over, _), _ = equation.params["dimension_numbers"]
        return 2.0 * made * math.prod(shapes[0][axis] for axis in over)
    if equation.primitive.name == "conv_general_dilated":
        features = equation.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * made * math.prod(shapes[1]) / shapes[1][features]
    return 0.0


@lru_cache(maxsize=128)
def _shapes(network: Classifier) -> Any:
    return jax.eval_shape(network.init, jax.random.key(0))


def _images(network: Classifier, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *network.image_shape), jnp.uint8)


def _loss(network: Classifier, params: Any, trained: Any, images: Any) -> Any:
    logits, _ = network.learn(params | trained, images, jax.random.key(0))
    return cross_entropy(logits, jnp.ones(logits.shape) / logits.shape[-1]).mean()


def held(network: Classifier, batch: int) -> int:
    """Bytes that a training step holds for its gradient, at most: XLA makes some of them anew."""
    return _held(network, batch, backend.platform())


@lru_cache(maxsize=128)
def _held(network: Classifier, batch: int, platform: str) -> int:
    def forward(params: Any, images: Any) -> Any:
        _, back = jax.vjp(partial(_loss, network, params, images=images), trainable(params))
        return back

    with backend.traced_for(platform):
        kept = jax.eval_shape(forward, _shapes(network), _images(network, batch))
    return bytes_of(kept)


@lru_cache(maxsize=128)
def _state(network: Classifier, recipe: Recipe, size: int) -> int:
    """Bytes of a training's state."""
    return bytes_of(jax.eval_shape(partial(start, network, recipe, size), jax.random.key(0)))


class Space(NamedTuple):
    """Bytes that the cells of a group take on a device in the last stages, as far as is foreseen.

    What XLA needs besides, and what earlier stages left there, is not in it.
    """

    images: int
    """The attackers' own, which all cells read; where they go by parts (`at_once`), none."""
    shared: int
    """The test sets, and where cells ask as they go the victims and what defences know."""
    each: int
    """The transfer set of a cell, and its stolen model before a step and after it."""
    at_work: int
    """What a training step of a cell holds for its gradient, see `held`."""

    def of(self, cells: int, *, together: bool) -> int:
        """Those of so many cells, whose steps are taken together or one after another."""
        steps = cells if together else 1
        return self.images + self.shared + cells * self.each + steps * self.at_work


def space(group: Group, opened: Mapping[Task, Opened], mesh: Mesh) -> Space:
    """What the cells of a group take on each device of a mesh (`mesh.arranged`), images whole."""
    attack, parties = group.attack, group.parties
    sources = [opened[task].sources[attack.source] for task in group.tasks]
    tables = sources if any(each is not sources[0] for each in sources) else sources[:1]
    images = sum(each.images.nbytes + each.labels.nbytes for each in tables)
    shared = sum(_tests(opened[task].data) for task in group.tasks)
    if group.drawn is None:
        shared += bytes_of(_shapes(parties.network)) * (len(group.tasks) + len(group.owners))
    size = attack.examples(attack.budget)
    each = transfer_bytes(group) + 2 * _state(parties.stolen, attack.recipe, size)
    share = -(-attack.recipe.batch_size // mesh.shape["data"])
    return Space(images, shared, each, held(parties.stolen, share))


def _tests(data: Dataset) -> int:
    """Of a test set, with the victim's posteriors."""
    return data.x_test.nbytes + len(data.x_test) * 4 * (1 + data.num_classes)


def transfer_bytes(group: Group) -> int:
    """What a transfer set takes; one whose images are not foreseen as if all were synthetic."""
    attack, parties = group.attack, group.parties
    image = 1 if group.drawn is not None else int(np.prod(parties.network.image_shape))
    return 4 * (attack.examples(attack.budget) * image + attack.budget * parties.num_classes)


def sends_numbers(group: Group, opened: Mapping[Task, Opened]) -> bool:
    """Whether an attack is foreseen, and looks at none of its images: numbers are all it needs."""
    if group.drawn is None:
        return False
    images = _own_images(group, opened)
    return _sends_numbers(group.parties, group.attack, (1, *images.shape))


@lru_cache(maxsize=128)
def _sends_numbers(parties: Parties, attack: Attack, shape: tuple[int, ...]) -> bool:
    told = jax.ShapeDtypeStruct((attack.budget, parties.num_classes), np.float32)
    point = Point(np.float32(0), np.uint32(0), told=told)
    own = Own(Unseen(shape), jax.ShapeDtypeStruct(shape[:2], np.int32))

    def ask(point: Point, own: Own) -> Any:
        transfer = stages.begin(parties, attack, None, point, (own, None))
        for r in range(attack.rounds):
            shared = own, None, jnp.int32(r)
            transfer = stages.proceed(parties, attack, None, (point, transfer), shared)
        return transfer.x

    try:
        return jax.eval_shape(ask, point, own).ndim == 1
    except Exception:  # whatever an attack does with images, of which there is the shape alone
        return False


def _own_images(group: Group, opened: Mapping[Task, Opened]) -> np.ndarray:
    return opened[group.tasks[0]].sources[group.attack.source].images


_LARGE = 1 / 32
"""Of a device's memory: a smaller set of images is there whole, whatever else has no room."""
_BATCHES = 16
"""Of images in a part, at least, before more cells are put side by side."""


def at_once(
    group: Group, opened: Mapping[Task, Opened], mesh: Mesh, cells: int, memory: float | None
) -> int | None:
    """How many images of its own a cell has on a device at a time, where not all have room there.

    cells: how many there are on a device, of `memory` bytes, None where that is not known. The
    result is None where all are there: they have room, or the attack is one that needs them all.
    """
    takes = space(group, opened, mesh)
    if not _by_parts(group, opened, takes, memory):
        return None
    together = not one_by_one(group.parties.networks)
    room = memory - takes._replace(images=0).of(cells, together=together)
    return _rows(_own_images(group, opened), room / cells, group.attack.recipe.batch_size)


def _rows(images: np.ndarray, room: float, batch: int) -> int:
    """How many go at a time where twice as many have room: whole batches, at least one."""
    return max(int(room / 2 / (images.nbytes / len(images)) // batch), 1) * batch


def _by_parts(
    group: Group, opened: Mapping[Task, Opened], takes: Space, memory: float | None
) -> bool:
    """Whether images stay on the host, from where each cell is sent its own, part by part."""
    if memory is None or takes.of(1, together=False) <= memory:
        return False
    images, batch = _own_images(group, opened), group.attack.recipe.batch_size
    return (
        images.nbytes > _LARGE * memory
        and len(images) > 2 * batch  # else parts take no less
        and group.attack.recipe.gradient is mean_gradient
        and sends_numbers(group, opened)
    )


def _with_parts(
    group: Group, opened: Mapping[Task, Opened], takes: Space, memory: float | None, rows: int
) -> Space:
    """What cells take where images that go by parts are `rows` at a time."""
    if not _by_parts(group, opened, takes, memory):
        return takes
    images = _own_images(group, opened)
    return takes._replace(images=0, each=takes.each + 2 * rows * images.nbytes // len(images))


def taken(
    group: Group, opened: Mapping[Task, Opened], mesh: Mesh, cells: int, memory: float | None
) -> int:
    """Bytes that so many cells take on a device."""
    takes, together = space(group, opened, mesh), not one_by_one(group.parties.networks)
    rows = at_once(group, opened, mesh, cells, memory)
    if rows is not None:
        takes = _with_parts(group, opened, takes, memory, rows)
    return takes.of(cells, together=together)


def wave_of(
    group: Group,
    opened: Mapping[Task, Opened],
    mesh: Mesh,
    per_device: int | None,
    memory: float | None,
) -> int:
    """How many cells of a group go through the last stages side by side (`mesh.wave_size`).

    By default no more than fit on the devices, each of which has `memory` bytes; None: not known.
    Where they are not all, waves are as even as can be.
    """
    networks = group.parties.networks
    size, devices = wave_size(len(group.places), mesh, per_device, networks), mesh.shape["cells"]
    if per_device is not None or memory is None:
        return size
    rows, together = _BATCHES * group.attack.recipe.batch_size, not one_by_one(networks)
    takes = _with_parts(group, opened, space(group, opened, mesh), memory, rows)
    wanted = most = size // devices
    while most > 1 and takes.of(most, together=together) > memory:
        most -= 1
    return devices * -(-wanted // -(-wanted // most))


def check_fits(
    group: Group, opened: Mapping[Task, Opened], mesh: Mesh, memory: float | None
) -> None:
    """Refuse cells of which not even one fits on a device, before any work.

    Raises:
        InputError: with the bytes of both.
    """
    if memory is None:
        return
    takes = space(group, opened, mesh)
    if isinstance(group.attack, Online):
        takes = takes._replace(each=0)  # it has no transfer set, and is small beside its images
    takes = _with_parts(group, opened, takes, memory, group.attack.recipe.batch_size)
    if takes.images + takes.shared + takes.each > memory:
        raise InputError(
            f"{group.label}: images and what else all cells share take "
            f"{in_bytes(takes.images + takes.shared)}, and a transfer set with its stolen model "
            f"{in_bytes(takes.each)}, on a device that has {in_bytes(memory)}: give a smaller "
            "budget or fewer images, or run it on devices with more memory"
        )


def at_once_alone(
    network: Classifier,
    recipe: Recipe,
    images: np.ndarray,
    data: Dataset,
    mesh: Mesh,
    memory: float | None,
) -> int | None:
    """`at_once` of a network that is trained on its own, on images, and tested on a data set."""
    if memory is None:
        return None
    count, plain = len(images), recipe.gradient is mean_gradient
    room = memory - _tests(data) - 2 * _state(network, recipe, count)
    room -= count * data.num_classes * 4  # the targets
    if plain:  # others may hold less than the gradient of a batch
        room -= held(network, -(-recipe.batch_size // mesh.shape["data"]))
    if images.nbytes <= max(room, _LARGE * memory) or count <= 2 * recipe.batch_size:
        return None
    return _rows(images, room, recipe.batch_size)


def check_fits_alone(
    task: Task,
    defenses: Sequence[Defended],
    opened: Opened,
    mesh: Mesh,
    memory: float | None,
) -> None:
    """Refuse victims whose images have no room on a device, and that cannot do with parts of them.

    defenses: those of the sweep, each of which may train a victim of its own.

    Raises:
        InputError: see `madjax.train.check_parts`.
    """
    trained = [each.rule.victim_recipe(task.victim, s) for each in defenses for s in each.strengths]
    for recipe in {task.victim, *trained}:
        if isinstance(recipe, Recipe):
            images = opened.data.x_train
            some = at_once_alone(opened.network, recipe, images, opened.data, mesh, memory)
            check_parts(recipe, len(images) if some is None else some, len(images))
