"""A run's victim behind its defence, as one function: what `madjax export` writes to a file."""

import json
from pathlib import Path

import jax
from jax import lax

from madjax import store
from madjax.attacks import keys
from madjax.config import Sweep, describe
from madjax.datasets import open_dataset
from madjax.defenses import Defense, as_function, fingerprints
from madjax.errors import InputError
from madjax.models import Classifier
from madjax.sweep.victim import keeper, make_classifier, owner_of, restore_victim

Array = jax.Array


def defended(
    config: Sweep,
    directory: str | Path,
    *,
    strength: float,
    defense: str | None = None,
    seed: int | None = None,
    data_dir: str | Path | None = None,
    any_platform: bool = False,
) -> tuple[Classifier, jax.stages.Wrapped]:
    """The victim of a run, and predict(images[B, H, W, C]) -> y_tilde [B, K] with its defence.

    strength: the defence's, epsilon for MAD. defense: which, by its label, of a run with several.
    seed: whose surrogate is taken, the one that stood behind the rows of that seed, and whose key
    draws the noise of a random defence; by default the run's first. That noise is a function of
    the image alone: who sends an image again, in any place of any batch, gets the same answer, and
    averages nothing out. (An image that differs in one pixel has noise of its own.) any_platform:
    networks take XLA's own convolution, where by default they take what is fast on this platform.

    Raises:
        InputError: an unknown defence, or a strength or seed that it has not; a directory without a
            trained victim, or with that of another config.
    """
    directory = Path(directory)
    chosen = _choose(config, defense)
    chosen.check_strength(strength)
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise InputError(
            f"seed is {seed}: the run has {', '.join(map(str, config.seeds))}, choose one of them"
        )
    data = open_dataset(config.dataset, data_dir)
    victim = make_classifier(config.architecture, data, "victim")
    _check_victim(config, directory)
    owner = owner_of(config, victim, data, keeper(directory, victim, len(data.x_train), print))
    params = restore_victim(owner, directory).params
    known = chosen.prepare(owner, keys(seed)["surrogate"])
    if any_platform and hasattr(victim.module, "convolution"):
        module = victim.module.clone(convolution=lax.conv_general_dilated)
        victim = Classifier(module, victim.preprocess, victim.image_shape)
    defend = as_function(chosen, victim.apply, known, strength)

    secret = keys(seed)["defense"]

    def predict(images: Array) -> Array:
        y = victim.posterior(params, images)
        return defend(secret, images, y, fingerprints(jax.random.fold_in(secret, 2), images))

    return victim, jax.jit(predict)


def _choose(config: Sweep, label: str | None) -> Defense:
    """The defence of this label, or the only one."""
    found = [d for d in config.defenses if label in (None, d.label)]
    if len(found) != 1:
        raise InputError(
            f"the config has {len(config.defenses)} defences, {len(found)} of them "
            f"{label or 'meant'}: choose one by its label, "
            + " | ".join(d.label for d in config.defenses)
        )
    return found[0]


def _check_victim(config: Sweep, directory: Path) -> None:
    try:
        held = json.loads((directory / store.CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} holds no run: make it with madjax sweep") from error
    wanted = json.loads(json.dumps(describe(config)))
    for field in ("dataset", "architecture", "victim", "victim_seed"):
        if held.get(field) != wanted[field]:
            raise InputError(
                f"{directory} holds a run with {field} = {held.get(field)}, not {wanted[field]}: "
                "give the config and the --set of that run"
            )
