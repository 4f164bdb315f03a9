"""What a data set's name says: where it is, how large its images are made, which are taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from madjax.datasets.listing import Listing
from madjax.errors import InputError

_HELP = (
    "write [start:stop] or [random:N] for train, or two of these with a comma for train and test, "
    "heldout:N and skip_corrupt before them; after a path that itself ends in ], write [:]"
)
_SEED = 0
"""Of draws: a name means the same images wherever it is written."""

Rule = Callable[[np.ndarray], np.ndarray]
"""Positions of a part -> those that are taken."""


class Name(NamedTuple):
    """A parsed name."""

    scheme: str
    """Empty for a bare name."""
    source: str
    side: int | None
    heldout: int
    """Images of each class that become the test part; 0: it has its own."""
    skip_corrupt: bool
    """Whether images that cannot be decoded are left out."""
    rules: tuple[Rule, ...]
    """Of train, and of test."""

    @property
    def base(self) -> str:
        """The name without side and rules."""
        return f"{self.scheme}:{self.source}" if self.scheme else self.source


def parse(name: str) -> Name:
    """Take a name apart.

    Raises:
        InputError: rules that are none.
    """
    base, rules = _split_rules(name)
    heldout, skip_corrupt = 0, False
    while rules and (match := re.fullmatch(r"heldout:([0-9]+)|skip_corrupt", rules[0])):
        rules = rules[1:]
        if match[1] is None:
            skip_corrupt = True
        elif not (heldout := int(match[1])):
            raise InputError(f"data set {name!r} holds 0 images out: give 1 or more")
    if len(rules) > 2:
        raise InputError(f"malformed subset rule in data set {name!r}: {_HELP}")
    side = None
    if match := re.fullmatch(r"(.+)@([0-9]+)", base):
        base, side = match[1], int(match[2])
        if not side:
            raise InputError(f"data set {name!r} asks for images of side 0: give 1 or more")
    scheme, colon, source = base.partition(":")
    scheme, source = (scheme, source) if colon else ("", base)
    positional = tuple(_rule(rule, name) for rule in rules)
    return Name(scheme, source, side, heldout, skip_corrupt, positional)


def base_name(name: str) -> str:
    """What a data set is called in results: no scheme, path, side or subset rule.

    "embedded:mnist[:5000]" and "npz:data/mnist.npz" are both "mnist", "tfds:emnist/letters:3.1.0"
    is "emnist_letters".
    """
    parsed = parse(name)
    if parsed.scheme == "tfds":
        return parsed.source.partition(":")[0].replace("/", "_")
    source = parsed.source or parsed.base
    return Path(source).name.removesuffix(".npz").removesuffix(".zip")


def choose(name: str, parsed: Name, listing: Listing) -> tuple[Listing, dict[str, np.ndarray]]:
    """The parts of a data set, and the positions in each that a name takes; none where all.

    Raises:
        InputError: a rule that leaves nothing, or draws more than there are.
    """
    chosen: dict[str, np.ndarray] = {}
    if parsed.heldout:
        listing, chosen = _hold_out(name, parsed.heldout, listing)
    for split, rule in zip(("train", "test"), parsed.rules, strict=False):
        part = listing.parts.get(split)
        positions = chosen.get(split, np.arange(part.size if part else 0))
        try:
            taken = rule(positions)
        except ValueError as error:
            raise InputError(
                f"data set {name!r} draws {error} {split} images and has {len(positions)}: draw "
                "fewer"
            ) from error
        if not len(taken):
            raise InputError(
                f"subset rule of data set {name!r} leaves none of the {len(positions)} {split} "
                "images: widen it"
            )
        chosen[split] = taken
    return listing, chosen


def _hold_out(name: str, count: int, listing: Listing) -> tuple[Listing, dict[str, np.ndarray]]:
    """`count` images of each class, drawn from the train part, as the test part."""
    train, test = listing.parts["train"], listing.parts.get("test")
    if test is not None and test.size:
        raise InputError(
            f"data set {name!r} has a test part of {test.size} images: leave heldout out"
        )
    labels, rng = train.labels(), np.random.default_rng(_SEED)
    held = np.zeros(train.size, bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) <= count:
            raise InputError(
                f"data set {name!r} holds {count} images of each class out, and class {label} has "
                f"{len(own)}: hold out fewer"
            )
        held[rng.permutation(own)[:count]] = True
    listing = listing._replace(parts={"train": train, "test": train})
    return listing, {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}


def _split_rules(name: str) -> tuple[str, list[str]]:
    if not name.endswith("]"):
        return name, []
    base, bracket, text = name[:-1].rpartition("[")
    rules = [rule.strip() for rule in text.split(",")]
    if not bracket or not base:
        raise InputError(f"malformed subset rule in data set {name!r}: {_HELP}")
    return base, rules


def _rule(rule: str, name: str) -> Rule:
    if match := re.fullmatch(r"random:([0-9]+)", rule):
        return _Random(int(match[1]))
    bounds = [bound.strip() for bound in rule.split(":")]
    if len(bounds) not in (2, 3) or not all(re.fullmatch(r"(-?[0-9]+)?", b) for b in bounds):
        raise InputError(f"malformed subset rule {rule!r} in data set {name!r}: {_HELP}")
    numbers = [int(bound) if bound else None for bound in bounds]
    if numbers[2:] == [0]:
        raise InputError(f"subset rule {rule!r} in data set {name!r} has step 0: use 1 or more")
    return _Slice(slice(*numbers))


class _Slice(NamedTuple):
    """A numpy slice."""

    taken: slice

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return positions[self.taken]


class _Random(NamedTuple):
    """So many, drawn without replacement, in their old order."""

    count: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        if self.count > len(positions):
            raise ValueError(self.count)
        drawn = np.random.default_rng(_SEED).choice(len(positions), self.count, replace=False)
        return positions[np.sort(drawn)]
