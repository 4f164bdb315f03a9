"""What a run is at, from another shell: `madjax status`."""

import json
import platform
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from madjax import store
from madjax.errors import InputError
from madjax.sweep.clock import Compiled
from madjax.sweep.plan import duration
from madjax.sweep.rows import DIVERGED


@dataclass(frozen=True)
class Status:
    """What a run has done, and whether a command is at work on it.

    progress is what the last command wrote down (`madjax.sweep.progress`), if it is known.
    """

    directory: str
    name: str
    at_work: bool | None
    """None where it cannot be told."""
    cells: int
    done: int
    """Cells that have their row."""
    diverged: int
    """Of these, those whose attacker diverged."""
    progress: dict[str, Any] | None

    @property
    def seconds_left(self) -> float | None:
        """Of training stolen models at their latest pace; None where that is not known."""
        pace = (self.progress or {}).get("examples_per_second")
        if not (self.at_work and pace):
            return None
        return (self.progress["examples_total"] - self.progress["examples"]) / pace

    def as_json(self) -> str:
        """All of it as one JSON object."""
        return json.dumps(asdict(self) | {"seconds_left": self.seconds_left}, indent=2)

    def text(self) -> str:
        """A line of what it is at, and one for each number."""
        diverged = f", {self.diverged} of them diverged" if self.diverged else ""
        lines = [
            f"{self.directory}: {self.name}, {self._state()}",
            f"cells     {self.done:,} of {self.cells:,} have their row{diverged}",
        ]
        if (said := self.progress) is not None:
            pace, left = said["examples_per_second"], self.seconds_left
            trained = f"{said['examples']:,} of {said['examples_total']:,} examples"
            trained += f", {pace:,.0f} a second" if pace else ""
            trained += f", {duration(left)} left" if left is not None else ""
            compiled = Compiled(**said["compiled"])
            age = f" ({_ago(said['at'])})" if self.at_work else ""
            lines += [
                f"stage     {said['stage']}{age}",
                f"trained   {trained}",
                f"programs  {compiled}",
            ]
        return "\n".join(lines)

    def _state(self) -> str:
        said = self.progress or {}
        if self.at_work:
            who = f" (process {said['process']} of {said['host']})" if said else ""
            return f"at work{who}"
        if self.done == self.cells:
            return "finished"
        if self.at_work is None:
            return "perhaps at work: its lock cannot be read"
        if said.get("state", "at work") != "at work":
            return f"{said['state']} {_ago(said['at'])}: go on with --resume"
        seen = f", last seen {_ago(said['at'])}" if said else ""
        if said and said["host"] != platform.node():  # whose locks may not be seen here
            return f"killed, or at work on {said['host']}{seen}"
        return f"killed{seen}: go on with --resume"


def _ago(moment: str) -> str:
    return f"{duration(max(time.time() - datetime.fromisoformat(moment).timestamp(), 0))} ago"


def status(directory: str | Path) -> Status:
    """What a run has done so far; it is not disturbed.

    Raises:
        InputError: no run is there; its config or a row is damaged.
    """
    directory = Path(directory)
    if not (directory / store.CONFIG).is_file():
        raise InputError(f"{directory} holds no run: give the --out of madjax sweep")
    config = store.read_config(directory)
    found = store.rows(directory)
    cells = config.get("cells") or [row.get("id", i) for i, row in enumerate(found)]  # of old runs
    rows = [row for i, row in enumerate(found) if row.get("id", i) in cells]
    return Status(
        str(directory),
        config.get("name", ""),
        store.is_at_work(directory),
        len(cells),
        len(rows),
        sum(row.get("status") == DIVERGED for row in rows),
        store.read_progress(directory),
    )
