"""A sweep's training for TensorBoard, by `madjax sweep --tensorboard`; an optional extra.

    DIR/tensorboard/LABEL, ID/    accuracy and loss of a network by epoch; of a stolen model also
                                  what it is and what came of it, for the table HPARAMS

Events are appended while the run waits, by no thread: what cannot be written is an error at once.
"""

import os
import platform
import re
import struct
import time
from pathlib import Path
from typing import Any

from madjax.errors import InputError, in_one_line
from madjax.sweep import Epoch

SETTINGS = "dataset", "queryset", "defense", "strength", "attack", "budget", "seed"
RESULTS = "attacker_accuracy", "attacker_fidelity", "defender_accuracy", "l1_mean"


class TensorBoard:
    """The callbacks of `madjax.sweep.run` that write event files into its directory.

    Raises:
        InputError: tensorboardX is not installed, or does not work.
    """

    def __init__(self, directory: str | Path):
        try:
            import tensorboardX.summary  # noqa: F401
        except ImportError as error:
            raise InputError(
                f'tensorboardX cannot be used ({in_one_line(error)}): pip install "madjax['
                'tensorboard]", or leave out --tensorboard'
            ) from error
        self._directory = Path(directory) / "tensorboard"
        # TensorBoard reads all files of a folder: each command has its own.
        self._name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"

    def on_epoch(self, epoch: Epoch) -> None:
        """Add a point to the curves of each network."""
        from tensorboardX.summary import scalar

        each = epoch.networks, epoch.ids, epoch.accuracy, epoch.loss
        for label, name, accuracy, loss in zip(*each, strict=True):
            points = scalar("accuracy", float(accuracy)), scalar("loss", float(loss))
            self._append(label, name, points, epoch.epoch)

    def on_row(self, row: dict[str, Any]) -> None:
        """Add a stolen model to the table of settings and results."""
        from tensorboardX.summary import hparams, scalar

        settings = {name: row[name] for name in SETTINGS if row.get(name) is not None}
        results = {name: row[name] for name in RESULTS if row.get(name) is not None}
        points = [scalar(name, value) for name, value in results.items()]
        self._append(row["label"], row["id"], [*hparams(settings, results), *points])

    def _append(self, label: str, name: str, summaries: Any, step: int = 0) -> None:
        from tensorboardX.proto.event_pb2 import Event

        title = re.sub(r"[^\w.,()=+ -]+", "_", label)[:180]  # file systems take 255 bytes
        folder = self._directory / f"{title}, {name}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self._name).open("ab") as file:
            if not file.tell():
                file.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
            for summary in summaries:
                file.write(_record(Event(wall_time=time.time(), step=step, summary=summary)))


def _record(event: Any) -> bytes:
    """An event as event files have it: its length and itself, each with a checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    size = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (size, data))
    return b"".join((size, next(sums), data, next(sums)))
