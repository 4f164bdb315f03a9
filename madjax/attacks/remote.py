"""A victim outside of JAX: a network in NumPy, or a prediction API behind a network connection.

    victim = RemoteVictim(ask, num_classes=10, directory="paid")
    transfer, state = madjax.steal(attack, seed, victim, ...)

`ask` is called from compiled code (`jax.experimental.io_callback`, ordered), once for each query: a
pure callback might be dropped or repeated, and each of these may cost money.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from madjax.constraints import off_the_simplex
from madjax.errors import InputError

Array = jax.Array
Ask = Callable[[np.ndarray], Any]
"""(images [B, H, W, C], uint8 as drawn or float32 as made) -> posteriors [B, K]."""

ANSWERS = "answers.bin"


class RemoteVictim:
    """A `Respond` of `madjax.steal` that asks outside of JAX, and keeps every answer on disk.

    ask(images [B, H, W, C]) -> posteriors [B, K], NumPy arrays; B is at most `batch`. It must not
    use JAX itself, which may wait for the program that is waiting for it. What ask raises ends the
    attack, and nothing that was answered is lost: the same attack with the same seed takes its
    queries from the directory, and asks only for what is not there. An image that was asked before
    under another number is asked again, as a random defence would answer otherwise.

    asked counts the queries that ask has answered by a posterior, kept those that the directory
    answered; failure is what ask raised last, which `madjax.steal` raises again.

    Raises:
        InputError: a directory with answers of other classes; at a query, answers that are no
            posteriors [B, num_classes], of which those that are have been kept.
    """

    def __init__(self, ask: Ask, *, num_classes: int, directory: str | Path, batch: int = 64):
        if batch < 1:
            raise InputError(f"batch is {batch}: give a number of queries >= 1")
        self.ask, self.num_classes, self.batch = ask, num_classes, batch
        self.asked = self.kept = 0
        self.failure: BaseException | None = None
        self._record = np.dtype(
            [("number", "<i8"), ("image", "S32"), ("answer", "<f4", (num_classes,))]
        )
        self._path = Path(directory) / ANSWERS
        self._paid = self._open()

    def __call__(self, numbers: Array, images: Array) -> Array:
        """Answers float32 [B, K] to the queries of these numbers; -1 is none, and answered by 0."""
        shape = jax.ShapeDtypeStruct((images.shape[0], self.num_classes), jnp.float32)
        return io_callback(self._answer, shape, numbers, images, ordered=True)

    def _answer(self, numbers: Any, images: Any) -> np.ndarray:
        self.failure = None
        try:
            return self._answered(numbers, images)
        except BaseException as failure:  # JAX tells of it in its own words, and pages of them
            self.failure = failure
            raise

    def _answered(self, numbers: Any, images: Any) -> np.ndarray:
        numbers, images = np.asarray(numbers), np.asarray(images)
        answers = np.zeros((len(numbers), self.num_classes), np.float32)
        missing = []
        for i in np.flatnonzero(numbers >= 0):
            paid = self._paid.get(_name(numbers[i], images[i]))
            if paid is None:
                missing.append(i)
            else:
                answers[i], self.kept = paid, self.kept + 1
        for at in range(0, len(missing), self.batch):
            some = missing[at : at + self.batch]
            answers[some] = self._shaped(self.ask(images[some]), len(some))
            wrong = [i for i in some if off_the_simplex(answers[i])]
            sound = [i for i in some if i not in wrong]
            self._keep([(*_name(numbers[i], images[i]), answers[i]) for i in sound])
            if wrong:
                raise InputError(
                    f"{len(wrong)} of the victim's {len(some)} answers are no posteriors: "
                    f"{off_the_simplex(answers[wrong])}; ask is to return probabilities: let it "
                    "divide rounded ones by their sum"
                )
        return answers

    def _shaped(self, said: Any, size: int) -> np.ndarray:
        said = np.asarray(said, np.float32)
        if said.shape != (size, self.num_classes):
            raise InputError(
                f"the victim answers {size} queries with an array of shape {said.shape}: ask is to "
                f"return posteriors [{size}, {self.num_classes}]"
            )
        return said

    def _open(self) -> dict[tuple[int, bytes], np.ndarray]:
        """The answers that the directory holds; a last one that is half written is cut off."""
        head = json.dumps({"num_classes": self.num_classes}).encode() + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        if not head.startswith(data[: len(head)]):
            raise InputError(
                f"{self._path} does not hold answers of {self.num_classes} classes: give another "
                "directory"
            )
        whole = max(len(data) - len(head), 0) // self._record.itemsize * self._record.itemsize
        if len(data) != len(head) + whole:
            self._path.write_bytes(head + data[len(head) : len(head) + whole])
        held = np.frombuffer(data[len(head) : len(head) + whole], self._record)
        return {(int(row["number"]), bytes(row["image"])): row["answer"] for row in held}

    def _keep(self, rows: list[tuple[int, bytes, np.ndarray]]) -> None:
        """On disk when this returns, before anything else is asked."""
        with self._path.open("ab") as file:
            file.write(np.array(rows, self._record).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._paid |= {(number, image): answer for number, image, answer in rows}
        self.asked += len(rows)


def _name(number: Any, image: np.ndarray) -> tuple[int, bytes]:
    """A query by its number and its content."""
    content = hashlib.sha256(f"{image.dtype} {image.shape}".encode() + image.tobytes())
    return int(number), content.hexdigest()[:32].encode()  # NumPy would drop zero bytes at the end
