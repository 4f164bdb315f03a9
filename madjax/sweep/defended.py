"""A run's victim behind its defence, as one function: what `madjax export` writes to a file."""

from pathlib import Path
from typing import Any

import jax
from jax import lax

from madjax import store
from madjax.attacks import keys
from madjax.config import Sweep, describe
from madjax.datasets import open_dataset
from madjax.defenses import as_function
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.sweep import cache
from madjax.sweep.tasks import make_classifier
from madjax.sweep.victim import finder, owner_of
from madjax.weights import Trained

Array = jax.Array


def defended(
    config: Sweep,
    directory: str | Path,
    *,
    strength: float,
    task: str | None = None,
    defense: str | None = None,
    seed: int | None = None,
    data_dir: str | Path | None = None,
    any_platform: bool = False,
) -> tuple[Classifier, jax.stages.Wrapped]:
    """The victim of a run, and predict(images[B, H, W, C]) -> y_tilde [B, K] with its defence.

    strength: the defence's, epsilon for MAD. task, defense: which, by its label or its position
    from 0, of a run with several. seed: whose surrogate is taken, the one that stood behind the
    rows of that seed, and whose key draws the noise of a random defence; by default the run's
    first. That noise is a function of the image alone: who sends an image again, in any place of
    any batch, gets the same answer, and averages nothing out. (An image that differs in one pixel
    has noise of its own.) A defence with fresh noise is refused. any_platform: networks take XLA's
    own convolution in float32, where by default they take what is fast on this platform.

    Raises:
        InputError: an unknown task or defence, or a strength or seed that it has not; a directory
            that does not hold the trained victim.
    """
    directory = Path(directory)
    chosen = _choose("tasks", config.tasks, task)
    rule = _choose("defences", config.defenses, defense).rule
    rule.check_strength(strength)
    if rule.is_fresh:
        raise InputError(
            f"{rule.label} draws new noise for each query, which one function of the images cannot "
            "do: export it without fresh noise"
        )
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise InputError(
            f"seed is {seed}: the run has {', '.join(map(str, config.seeds))}, choose one of them"
        )
    if not (directory / store.CONFIG).is_file():
        raise InputError(f"{directory} holds no run: make it with madjax sweep")
    if isinstance(chosen.victim, Trained):
        _check_same(directory, chosen.victim)
    data = open_dataset(chosen.dataset, data_dir, folder=cache.folder())
    victim = make_classifier(chosen.architecture, data, "victim")
    owner = owner_of(chosen, victim, data, finder(directory, chosen, victim, data))
    params = owner.train_victim().params
    known = rule.prepare(owner, keys(seed)["surrogate"], (strength,))
    if any_platform and hasattr(victim.module, "convolution"):
        kept = {"dtype": "float32"} if hasattr(victim.module, "dtype") else {}
        module = victim.module.clone(convolution=lax.conv_general_dilated, **kept)
        victim = Classifier(module, victim.preprocess, victim.image_shape)
    defend = as_function(rule, victim.apply, known, strength)

    secret = keys(seed)["defense"]

    def predict(images: Array) -> Array:
        y = victim.posterior(params, images)
        return defend(secret, images, y)

    return victim, jax.jit(predict)


def _check_same(directory: Path, victim: Trained) -> None:
    """Refuse a victim that is given, of which the run's rows are not."""
    tasks = store.read_config(directory).get("tasks", [])
    if describe(victim) not in [task["victim"] for task in tasks]:
        raise InputError(
            f"the victim in {victim.path} is not that of the run in {directory}: give the run's, "
            "or the directory of a run of this one"
        )


def _choose(what: str, values: tuple[Any, ...], wanted: str | None) -> Any:
    """The one of this label or position, or the only one."""
    found = [v for i, v in enumerate(values) if wanted in (None, v.label, str(i))]
    if len(found) != 1:
        raise InputError(
            f"the config has {len(values)} {what}, {len(found)} of them {wanted or 'meant'}: "
            f"choose one by its label or position, {' | '.join(v.label for v in values)}"
        )
    return found[0]
