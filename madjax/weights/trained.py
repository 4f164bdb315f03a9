"""Networks that are given: as a victim, or for others to start from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from madjax.errors import InputError
from madjax.models import Classifier
from madjax.weights.files import arrays_of, digest_of, path_of
from madjax.weights.fits import check_finite, check_names, check_shape
from madjax.weights.pytorch import GIVEN, fitted

Array = jax.Array


@dataclass(frozen=True)
class Trained:
    """A network that was trained elsewhere, by the file or directory that it is in.

    path: weights in PyTorch's layout, as `from_torch` takes them; or a checkpoint of a madjax run,
    `RUN/checkpoints/NAME`, of which the last epoch is taken.

    It is read when this is made. What tells one from another, in `id` and `task_settings` of rows,
    is `digest`, which is of the arrays and their names: the file may be moved, and saved anew. On
    an accelerator VGG16 and ResNet18 compute in bfloat16, unless their dtype says otherwise.

    Raises:
        InputError: it cannot be read.
    """

    path: str = field(compare=False, metadata={"described": False})
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "digest", digest_of(arrays_of(self.path)))

    def variables(self, classifier: Classifier) -> dict[str, Any]:
        """The variables of a network, which these have to fit.

        Raises:
            InputError: they do not fit; they are not those of when this was made.
        """
        return _variables(self, classifier)

    def body(self, classifier: Classifier) -> dict[str, Array]:
        """The variables of a network but for its last layer, by their paths, joined by "/".

        The last layer is what depends on the module's field num_classes; that of the file may be of
        other classes. So a network starts from one that was trained on something else.

        Raises:
            InputError: the others do not fit; a module without that field.
        """
        return _body(self, classifier)


@lru_cache(maxsize=1)  # as a run asks for them several times
def _variables(trained: Trained, classifier: Classifier) -> dict[str, Any]:
    return _fitted(trained, classifier, frozenset())


@lru_cache(maxsize=4)
def _body(trained: Trained, classifier: Classifier) -> dict[str, Array]:
    head = _head(classifier)
    return flatten_dict(_fitted(trained, classifier, head), sep="/")


def _head(classifier: Classifier) -> frozenset[str]:
    """The paths of the variables that depend on the number of classes."""
    module = classifier.module
    if not hasattr(module, "num_classes"):
        raise InputError(
            f"{type(module).__name__} has no field num_classes, by which its last layer is known: "
            "name the field so"
        )
    wider = replace(classifier, module=module.clone(num_classes=module.num_classes + 1))
    here, there = (
        flatten_dict(jax.eval_shape(each.init, jax.random.key(0)), sep="/")
        for each in (classifier, wider)
    )
    return frozenset(name for name in here if here[name].shape != there[name].shape)


def _fitted(trained: Trained, classifier: Classifier, head: frozenset[str]) -> dict[str, Any]:
    """The variables of a network but for those of its head, the paths that are given."""
    with jax.ensure_compile_time_eval():  # as they may be asked for inside a trace
        held = arrays_of(trained.path)
        if digest_of(held) != trained.digest:
            raise InputError(
                f"{trained.path} was changed after its config was read: leave it as it is until "
                "the run has ended"
            )
        if path_of(trained.path).is_dir():
            return _as_they_are(classifier, held, trained.path, head)
        return fitted(classifier, held, trained.path, GIVEN, skipped=head)


def _as_they_are(
    classifier: Classifier, held: Mapping[str, np.ndarray], said: str, head: frozenset[str]
) -> Any:
    """The variables of a network, but those of its head, from the arrays at their paths."""
    shapes = flatten_dict(jax.eval_shape(classifier.init, jax.random.key(0)), sep="/")
    shapes, held = ({n: v for n, v in each.items() if n not in head} for each in (shapes, held))
    network = type(classifier.module).__name__
    check_names(said, network, held, set(shapes), "from a run of it")
    for name, wanted in shapes.items():
        check_shape(said, name, held[name].shape, wanted.shape, classifier)
        check_finite(said, name, held[name])
    return unflatten_dict({name: jnp.asarray(held[name]) for name in shapes}, sep="/")
