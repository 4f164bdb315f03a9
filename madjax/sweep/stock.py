"""What the cells of a run share, each made once: victims, prepared defences, utility, answers."""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from madjax.attacks import keys
from madjax.batching import QUERIES, bytes_of
from madjax.config import Task, digest
from madjax.defenses import Defense, Owner
from madjax.errors import InputError
from madjax.sweep import rates, stages
from madjax.sweep.cache import Cache, Key, Maker
from madjax.sweep.clock import Stopwatch
from madjax.sweep.keyring import Asked, Keyring
from madjax.sweep.load import at_once_alone
from madjax.sweep.mesh import arranged, everywhere, fetch, memory_of, over_rows, within_process
from madjax.sweep.passes import Pass
from madjax.sweep.progress import Progress
from madjax.sweep.rates import Rates
from madjax.sweep.rows import task_facts
from madjax.sweep.stages import Api, Own, Tests, Unseen
from madjax.sweep.tasks import Opened
from madjax.sweep.victim import Keep, Planned, keeper, owner_of, planner
from madjax.sweep.work import Group, Place, check_answers
from madjax.train import State

Array = jax.Array

LARGEST_TRANSFER = 2**26
"""Bytes of a transfer set that the cache keeps; synthetic images of a grid would fill disks."""


class _Victim(NamedTuple):
    """A trained victim and its owner."""

    owner: Owner
    state: State


class Stock:
    """The results of the stages that many cells read, from the cache or made and kept there.

    What belongs to a defence is dropped as soon as another one is asked for.
    """

    def __init__(
        self,
        opened: Mapping[Task, Opened],
        directory: Path,
        mesh: Mesh,
        kept: Cache,
        progress: Progress,
        memory: float | None = None,
        per_cell: int | None = None,
    ):
        self.opened, self._directory, self._mesh = opened, directory, mesh
        self.memory, self._alone = memory_of(mesh, memory), memory_of(mesh, memory, alone=True)
        self._per_cell = per_cell
        self.kept, self._progress = kept, progress
        self.pace = Rates(kept.folder, kept.maker["device"])
        self.keys = Keyring(opened)
        self._victims: dict[Task, _Victim] = {}
        self._tested: dict[Task, np.ndarray] = {}
        self._rule: Defense | None = None
        self._of_rule: dict[Any, Any] = {}
        self._makers: dict[Any, dict[str, Maker]] = defaultdict(dict)

    def facts(self, group: Group, place: Place, stolen: Maker | None = None) -> dict[str, Any]:
        """The fields of a row that its task says, and what made results of other runs behind it.

        stolen: what made the stolen model.
        """
        rule, task, sent = group.rule, place.task, _sent(group, place.task, place.seed)
        asked = [(*scope, each) for scope in ((task,), (rule, place)) for each in (None, sent)]
        scopes = task, (rule, task, place.seed), *asked
        found = {stage: maker for scope in scopes for stage, maker in self._makers[scope].items()}
        found |= {"stolen model": stolen} if stolen else {}
        elsewhere = {stage: maker for stage, maker in found.items() if maker != self.kept.maker}
        known = task_facts(self.opened[place.task].data, self._victim(place.task).state)
        return known | {"made_elsewhere": elsewhere}

    def own(self, group: Group, *, unseen: bool = False) -> Own:
        """The attackers' images, on every device: one table where all tasks share it.

        unseen: only their classes, and how many images there are.
        """
        found = [self.opened[task].sources[group.attack.source] for task in group.tasks]
        if all(each is found[0] for each in found):
            found = found[:1]
        labels = np.stack([each.labels for each in found])
        if unseen:
            images = Unseen((len(found), *found[0].images.shape))
        else:
            tables = [each.images for each in found]  # no copy of one that is mapped from a file
            images = tables[0][None] if len(tables) == 1 else np.stack(tables)
        return everywhere(Own(images, labels), self._mesh)

    def tests(self, group: Group) -> Tests:
        """The test sets, on every device."""
        each = [
            (
                self.opened[task].data.x_test,
                self.opened[task].data.y_test,
                self._test_posteriors(task),
            )
            for task in group.tasks
        ]
        return everywhere(Tests(*map(np.stack, zip(*each, strict=True))), self._mesh)

    def api(self, group: Group) -> Api:
        """The victims, and what the defence knows for each of `Group.owners`, on every device."""
        victims = [self._victim(task).state.params for task in group.tasks]
        known = [self._known(group, task, seed) for task, seed in group.owners]
        return everywhere(Api(*map(_stacked, (victims, known))), self._mesh)

    def utility(self, group: Group) -> dict[Place, dict[str, float]]:
        """What the defence costs honest users, at each place, measured on the test set.

        Raises:
            InputError: a defence that answers NaN.
        """
        found = {}
        for owner in group.owners:
            found |= self._at_places(group, *owner, "utility", self._utility)
        for place, values in found.items():
            check_answers(group.rule, place, values["l1_mean"])
        return found

    def told(self, group: Group) -> dict[Place, np.ndarray]:
        """The answers [Q, K] to the queries that the attack sends, at each place."""
        began, found = time.perf_counter(), {}
        for task, seed in group.owners:
            found |= self._at_places(group, task, seed, _sent(group, task, seed), self._told)
        self._progress.log(
            f"{group.label}: {len(found)} x {group.attack.budget:,} queries answered in "
            f"{time.perf_counter() - began:.1f} s"
        )
        return found

    @contextmanager
    def collecting(
        self, group: Group, places: list[Place], like: Any
    ) -> Iterator[list[Any] | None]:
        """Hold the transfer sets of a wave while they are made; gives them if the cache has all.

        like has a leading axis of cells. Large ones are neither kept nor looked for.
        """
        like = _of_a_cell(like)
        if not _is_kept(like):
            yield None
            return
        names = [self.keys.transfer(group, place) for place in places]
        with self.alone_with(names, like) as held:
            if held is None:
                yield None
                return
            for place, (_, maker) in zip(places, held, strict=True):
                sent = _sent(group, place.task, place.seed)
                self._makers[group.rule, place, sent]["transfer"] = maker
            yield [transfer for transfer, _ in held]

    @contextmanager
    def alone_with(self, names: list[Key], like: Any) -> Iterator[list[tuple[Any, Maker]] | None]:
        """Hold results while they are made; gives them if the cache has all."""
        with ExitStack() as locks:
            # Each once, as two places may share one; in one order, so that no two commands wait for
            # each other.
            for _, name in sorted({str(name.digest): name for name in names}.items()):
                locks.enter_context(self.kept.alone(name, self._progress.log))
            held = [self.kept.get(name, like) for name in names]
            yield None if None in held else held

    def keep_transfers(self, group: Group, places: list[Place], transfers: Any) -> None:
        """Put the finished transfer sets of a wave into the cache, if they are no large ones."""
        if not _is_kept(_of_a_cell(transfers)):
            return
        whole = fetch(transfers)
        for i, place in enumerate(places):
            mine = jax.tree.map(lambda a, i=i: a[i], whole)
            self.kept.put(self.keys.transfer(group, place), mine)

    def foreseen(self, group: Group, task: Task, seed: int | None) -> tuple[list[Planned], Any]:
        """The networks that a defence would train for a victim and a seed, and what it would know.

        That as shapes. For None it is the victim that would be trained.
        """
        each = self.opened[task]
        keep, found = planner(self._directory, task, each.network, each.data, self.kept)
        owner = owner_of(task, each.network, each.data, keep)
        if seed is None:
            return found, jax.eval_shape(owner.train_victim)
        key = keys(seed)["surrogate"]
        return found, jax.eval_shape(lambda: group.rule.prepare(owner, key, group.strengths))

    def _at_places(
        self,
        group: Group,
        task: Task,
        seed: int,
        what: Hashable,
        make: Callable[[Group, Task, int, tuple[float, ...]], Sequence[Any]],
    ) -> dict[Place, Any]:
        """A result at the group's strengths; those that are not there are made in one pass."""
        made = self._of(group.rule).setdefault((what, task, seed), {})
        wanted = [place for place in group.places if (place.task, place.seed) == (task, seed)]
        missing = tuple(place.strength for place in wanted if place.strength not in made)
        if missing:
            made |= zip(missing, make(group, task, seed, missing), strict=True)
        return {place: made[place.strength] for place in wanted}

    def _utility(
        self, group: Group, task: Task, seed: int, strengths: tuple[float, ...]
    ) -> list[dict[str, float]]:
        key, asked = stages.tests_key(group.rule, seed), self.keys.tested(task)
        told = np.stack(self._answers(group, task, seed, key, asked, strengths))
        y, labels = self._test_posteriors(task), self.opened[task].data.y_test
        measured = jax.device_get(stages.utility(y, told, labels))
        return [{name: each[i] for name, each in measured.items()} for i in range(len(told))]

    def _told(
        self, group: Group, task: Task, seed: int, strengths: tuple[float, ...]
    ) -> list[np.ndarray]:
        asked, key = self.keys.queries(group, task, seed), keys(seed)["defense"]
        return self._answers(group, task, seed, key, asked, strengths, _sent(group, task, seed))

    def _answers(
        self,
        group: Group,
        task: Task,
        seed: int,
        key: Array,
        asked: Asked,
        strengths: tuple[float, ...],
        sent: Hashable = None,
    ) -> list[np.ndarray]:
        """The answers [Q, K] at each strength; those that the cache lacks are made in one pass.

        sent says which queries of attacks they are, None that they are the test set.
        """
        rule, network, at = group.rule, self.opened[task].network, self._progress.at
        names = {each: self.keys.answers(rule, task, seed, asked, each) for each in strengths}
        like = jax.ShapeDtypeStruct((asked.count, group.parties.num_classes), np.float32)
        whole = self.keys.answers(rule, task, seed, asked, None)
        with self.kept.alone(whole, self._progress.log):
            found = {}
            for strength, name in names.items():
                held = self.kept.get(name, like)
                if held is not None:
                    found[strength] = held[0]
                    scope = rule, Place(task, strength, seed), sent
                    self._makers[scope]["answers" if sent else "test answers"] = held[1]
            missing = tuple(each for each in strengths if each not in found)
            if missing:
                known, y = self._known(group, task, seed), self._posteriors(task, asked, sent)
                spread = {"over": over_rows(self._mesh), "chunk": QUERIES * self._mesh.size}
                of = whole.digest and f"{whole.name}-{digest(list(missing))}"
                title = f"{task.label}, {rule.label}: {'queries' if sent else 'test images'}"
                shape = len(missing), *like.shape
                under_way = Pass(self._directory, of, shape, partial(at, title, total=asked.size))
                share, watch = 1 - under_way.done / asked.size, Stopwatch()

                def after_chunk(done: int) -> None:
                    with watch.paused():
                        under_way.after_chunk(done)

                with watch:
                    made = stages.answers(
                        rule,
                        network,
                        known,
                        key,
                        asked.images,
                        y,
                        missing,
                        sent=asked.sent,
                        told=under_way.told,
                        done=under_way.done,
                        after_chunk=after_chunk,
                        **spread,
                    )
                amount = round(asked.count * len(missing) * share)
                self.pace.note(rates.answering(rule, network), amount, watch.running)
                found |= zip(missing, made, strict=True)
                for strength in missing:
                    self.kept.put(names[strength], found[strength])
                under_way.end(kept=all(self.kept.has(names[each]) for each in missing))
        return [found[each] for each in strengths]

    def _posteriors(self, task: Task, asked: Asked, sent: Hashable = None) -> np.ndarray:
        """The victim's own posteriors of each image; sent as in `_answers`."""
        opened, name = self.opened[task], self.keys.posteriors(task, asked)
        like = jax.ShapeDtypeStruct((asked.size, opened.data.num_classes), np.float32)
        with self.kept.alone(name, self._progress.log):
            held = self.kept.get(name, like)
            if held is not None:
                stage = "posteriors" if sent else "test posteriors"
                self._makers[task, sent][stage] = held[1]
                return held[0]
            params, over = self._victim(task).state.params, over_rows(self._mesh)
            watch = Stopwatch()
            with watch:
                spread = {"over": over, "chunk": QUERIES * self._mesh.size}
                y = stages.victim_posteriors(opened.network, params, asked.images, **spread)
            self.pace.note(rates.knowing(opened.network), len(y), watch.running)
            self.kept.put(name, y)
        return y

    def _test_posteriors(self, task: Task) -> np.ndarray:
        if task not in self._tested:
            self._tested[task] = self._posteriors(task, self.keys.tested(task))
        return self._tested[task]

    def _known(self, group: Group, task: Task, seed: int) -> Any:
        """What a defence has prepared for a victim and a seed."""
        rule, strengths = group.rule, group.strengths
        made = self._of(rule)
        if (task, seed) not in made:
            began = time.perf_counter()
            owner = self._victim(task).owner
            owner = replace(owner, keep=self._keeper(task, (rule, task, seed)))
            known = rule.prepare(owner, keys(seed)["surrogate"], strengths)
            made[task, seed] = jax.block_until_ready(known)
            took = f"{time.perf_counter() - began:.1f} s"
            self._progress.log(f"{task.label}, {rule.label}: prepared for seed {seed} in {took}")
        return made[task, seed]

    def _keeper(self, task: Task, scope: Hashable) -> Keep:
        """Trains networks; what made one that the cache had is noted under a scope."""
        opened = self.opened[task]
        mesh = arranged(within_process(self._mesh), 1, self._per_cell, [opened.network])
        return keeper(
            self._directory,
            task,
            opened.network,
            opened.data,
            self.kept,
            self.pace,
            self._makers[scope].__setitem__,
            self._progress,
            mesh,
            partial(at_once_alone, data=opened.data, mesh=mesh, memory=self._alone),
        )

    def _of(self, rule: Defense) -> dict[Any, Any]:
        """The results that belong to a defence."""
        if rule != self._rule:
            self._rule, self._of_rule = rule, {}
        return self._of_rule

    def _victim(self, task: Task) -> _Victim:
        if task not in self._victims:
            each = self.opened[task]
            owner = owner_of(task, each.network, each.data, self._keeper(task, task))
            state = owner.train_victim()
            if not np.isfinite(state.accuracy[-1]):
                raise InputError(f"the victim of {task.label} answers NaN: give another")
            self._victims[task] = _Victim(owner, state)
        return self._victims[task]


def _sent(group: Group, task: Task, seed: int) -> Hashable:
    """What tells the queries of one attack from those of others."""
    if group.drawn is None:
        return group.attack
    return group.attack.source, group.drawn[task][seed].tobytes()


def _of_a_cell(wave: Any) -> Any:
    """The shapes of one cell's arrays, from those of a wave or from their shapes."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), wave)


def _is_kept(transfer: Any) -> bool:
    """Whether the cache keeps a transfer set of these shapes."""
    return bytes_of(transfer) <= LARGEST_TRANSFER


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
