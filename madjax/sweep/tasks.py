"""Tasks opened: the images behind their names and the networks that take them, checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np

from madjax.attacks import Attack
from madjax.config import Task, name_of
from madjax.datasets import Dataset, check_compatible, open_dataset
from madjax.errors import InputError, in_one_line
from madjax.models import Classifier
from madjax.sweep.stages import Parties
from madjax.weights import Trained


class Source(NamedTuple):
    """Images that an attacker may own, with their classes."""

    images: np.ndarray
    labels: np.ndarray
    num_labels: int


@dataclass(frozen=True, eq=False)
class Opened:
    """A task with its data and its victim's network, which fit each other.

    sources are what attackers may own: the "queryset", and the victim's training images under
    "dataset". checksums are of both.
    """

    task: Task
    data: Dataset
    network: Classifier
    sources: dict[str, Source]
    checksums: dict[str, int]

    def parties(self, attack: Attack) -> Parties:
        """The networks of the victim and of an attacker."""
        stolen = make_classifier(attack.architecture, self.data, "attacker")
        own, data = self.sources[attack.source], self.data
        return Parties(self.network, stolen, data.family, data.num_classes, own.num_labels)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What the programs of the victim and its defences depend on."""
        return self.network, self.data.num_classes, len(self.data.x_train), len(self.data.x_test)


def open_tasks(
    tasks: Iterable[Task],
    data_dir: str | Path | None,
    folder: Path | None,
    datasets: Mapping[str, Dataset] | None = None,
) -> dict[Task, Opened]:
    """Open the data of tasks, each set once, and check that victims and attackers can use it.

    folder: where images that have to be decoded are kept for the next time. datasets: those that
    are at hand, by the whole names that tasks have for them.

    Raises:
        InputError: see `open_dataset`; sets, architectures and given victims that do not fit each
            other, and attackers that would train on the images they are judged by.
    """
    given = datasets or {}

    @cache
    def opened(name: str) -> Dataset:
        return given[name] if name in given else open_dataset(name, data_dir, folder=folder)

    @cache
    def drawn_from(queryset: str, splits: tuple[str, ...]) -> tuple[Source, int]:
        data = opened(queryset)
        parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
        chosen = zip(*map(parts.get, splits), strict=True)
        images, labels = (p[0] if len(p) == 1 else np.concatenate(p) for p in chosen)
        return Source(images, labels, data.num_classes), crc32(labels, crc32(images))

    @cache
    def known(queryset: str, splits: tuple[str, ...]) -> set[bytes]:
        return set(map(_fingerprint, drawn_from(queryset, splits)[0].images))

    @cache
    def trained_on(dataset: str) -> Source:
        data = opened(dataset)
        return Source(data.x_train, data.y_train, data.num_classes)

    def open_one(task: Task) -> Opened:
        data, queryset = opened(task.dataset), opened(task.queryset)
        check_compatible(data, queryset)
        if not len(data.x_test):
            raise InputError(f"data set {data.name} has no test images: nothing can be evaluated")
        asked, checksum = drawn_from(task.queryset, task.query_splits)
        _check_apart(data, task, known(task.queryset, task.query_splits))
        network = make_classifier(task.architecture, data, "victim")
        if isinstance(task.victim, Trained):
            task.victim.variables(network)  # which it has to fit
        sources = {"queryset": asked, "dataset": trained_on(task.dataset)}
        sums = {"dataset": data.checksum(), "queryset": checksum}
        return Opened(task, data, network, sources, sums)

    return {task: open_one(task) for task in tasks}


def _check_apart(victim: Dataset, task: Task, known: set[bytes]) -> None:
    """Refuse test images of the victim as queries: stolen models would train on their own test.

    known: the fingerprints of the images that attackers may draw. A few that two sets happen to
    share, up to one in a hundred, are no concern.
    """
    both = sum(_fingerprint(image) in known for image in victim.x_test)
    if both > len(victim.x_test) / 100:
        raise InputError(
            f"{both} of the {len(victim.x_test)} test images of {victim.name}, by which stolen "
            f"models are judged, are in the {' and '.join(task.query_splits)} part of the query "
            f"set {task.queryset}: give another part in query_splits, or another queryset"
        )


def _fingerprint(image: np.ndarray) -> bytes:
    return blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def make_classifier(architecture: Any, data: Dataset, role: str) -> Classifier:
    """The network of one party, checked on the victim's image shape and classes."""
    name = name_of(architecture)
    blank = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.uint8)
    try:
        module = architecture(data.num_classes)
        classifier = Classifier(module, data.family.inputs, data.image_shape)
        variables = jax.eval_shape(classifier.init, jax.random.key(0))
        logits = jax.eval_shape(classifier.apply, variables, blank)
        classifier.check_learns(variables)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the {role}'s {name} cannot take images of shape {data.image_shape} "
            f"({in_one_line(error)}): choose another architecture or data set"
        ) from error
    if logits.shape != (1, data.num_classes):
        raise InputError(
            f"the {role}'s {name} gives outputs {logits.shape[1:]} for the "
            f"{data.num_classes} classes of {data.name}: choose another architecture"
        )
    return classifier
