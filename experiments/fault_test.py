"""What a sweep loses when it is killed, or its disk fails: nothing that was done.

Claim: a sweep that is killed (-9) 20 times at random moments, and resumed each time, ends with the
rows of one that was left alone: none lost, none doubled, none with another result. A full disk, a
directory that cannot be written, a damaged checkpoint, a half-written row and a changed config are
named in one line. What can go on does.
Command: python experiments/fault_test.py --out OUT
Cost: 9 to 17 minutes on 2 CPU cores.

The grid is 8 cells: perceptrons, 600 images of MNIST, MAD at two strengths, knockoff and jbda at
two budgets. Each command is a process of its own, `madjax sweep CONFIG --resume`. Compiled programs
are kept between them, as otherwise most kills would come while something is compiled. A small tmpfs
is the disk that fills up; it takes the right to mount one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

from measuring import markdown, parse, seconds, write

from madjax import MAD, MLP, Defended, Knockoff, Recipe, Sweep, Task, jbda

SETS = "embedded:mnist[:600,:500]", "embedded:fashion_mnist[:600]"
FIELDS = ("attacker_accuracies", "attacker_losses", "attacker_fidelity", "defender_accuracy")


def config():
    """The grid; the commands read it from this file."""
    recipe = Recipe(epochs=int(os.environ.get("EPOCHS", "12")))
    return Sweep(
        "fault",
        (Task(*SETS, architecture=MLP, victim=recipe),),
        (Defended(MAD(layers="last"), (0.5, 0.99)),),
        (
            Knockoff(budget=200, architecture=MLP, recipe=recipe),
            jbda(
                budget=200, seeds=50, architecture=MLP, substitute=Recipe(epochs=2), recipe=recipe
            ),
        ),
        budgets=(100,),
    )


def hear():
    """Let a command have an interrupt, which what runs behind a shell ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Sweeps:
    """Commands in a folder, each with the same programs at hand."""

    def __init__(self, folder, epochs):
        self.folder = folder
        self.settings = {
            "EPOCHS": str(epochs),
            "PYTHONPATH": str(Path(__file__).parent),  # of `measuring`
            "MADJAX_CACHE": "",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, out, *options):
        """A command under way."""
        words = [sys.executable, "-m", "madjax", "sweep", str(Path(__file__).resolve())]
        words += ["--out", str(out), "--resume", *options]
        with (self.folder / "log").open("w") as log:
            settings = {"env": os.environ | self.settings, "stdout": log, "stderr": log}
            return subprocess.Popen(words, **settings, preexec_fn=hear)

    def run(self, out, *options):
        """The exit status of a command and what it said last."""
        status = self.start(out, *options).wait()
        return status, (self.folder / "log").read_text().splitlines()

    def finish(self, out):
        """Run to the end; whether it got there."""
        status, said = self.run(out)
        if status:
            raise SystemExit("\n".join(said[-20:]))


def rows_of(out):
    """The results of each cell, by id; with how many lines there are."""
    lines = (out / "rows.jsonl").read_text().splitlines() if (out / "rows.jsonl").exists() else []
    rows = []
    for line in lines:
        with suppress(ValueError):  # half written
            rows.append(json.loads(line))
    return {row["id"]: [row[field] for field in FIELDS] for row in rows}, len(rows)


def stage_of(out):
    """What a run was at, by the checkpoints that are there."""
    names = [path.name for path in (out / "checkpoints").glob("*")]
    for part, stage in (("-budget-", "stolen models"), ("-transfer", "queries"), ("victim", "")):
        if any(part in name for name in names):
            return stage or "victim or answers"
    return "start"


def kill(sweeps, kills, seed, wanted, whole, idle):
    """Kill commands at random moments until there were so many; what came of them."""
    rng, stages, lost, doubled, differing, runs = random.Random(seed), Counter(), 0, 0, 0, 0
    while stages.total() < kills:
        out, under_way, runs = sweeps.folder / f"killed-{runs}", True, runs + 1
        while under_way and stages.total() < kills:
            process = sweeps.start(out)
            try:
                process.wait(idle / 2 + rng.random() * (whole - idle / 2))
                under_way = False
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                stages[stage_of(out)] += 1
        sweeps.finish(out)
        found, lines = rows_of(out)
        lost += len(set(wanted) - set(found))
        doubled += lines - len(found)
        differing += sum(found.get(name) != row for name, row in wanted.items())
    return {
        "kills": stages.total(),
        "runs": runs,
        "rows_lost": lost,
        "rows_doubled": doubled,
        "rows_differing": differing,
        "moments": dict(stages),
    }


@contextmanager
def disk(folder, size):
    """A file system of so many kilobytes; None where none can be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
    with suppress(OSError):
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            try:
                yield folder
            finally:
                subprocess.run(["umount", str(folder)], check=True)
            return
    yield None


def remount(folder, how):
    """Change a file system under way."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def full(sweeps, size):
    """A run on a disk of so many kilobytes, which is then made larger."""
    with disk(sweeps.folder / f"disk-{size}", size) as place:
        if place is None:
            return None
        out = place / "run"
        failed = sweeps.run(out)
        remount(place, "size=64m")
        sweeps.finish(out)
        return (*failed, rows_of(out))


def read_only(sweeps):
    """A run in a directory that is written, then cannot be, then can again."""
    with disk(sweeps.folder / "disk-ro", 65536) as place:
        if place is None:
            return None
        out = place / "run"
        begun(sweeps, out)
        remount(place, "ro")
        failed = sweeps.run(out)
        remount(place, "rw")
        sweeps.finish(out)
        return (*failed, rows_of(out))


def begun(sweeps, out):
    """A run that was killed after an epoch of its stolen models."""
    process = sweeps.start(out)
    while process.poll() is None and not list(out.glob("checkpoints/attack-*/[3-9]")):
        time.sleep(0.005)
    process.kill()
    process.wait()


def damaged(sweeps):
    """A run whose checkpoints have all lost the half of their largest files."""
    out = sweeps.folder / "damaged"
    begun(sweeps, out)
    for step in out.glob("checkpoints/*/*"):
        files = sorted((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        for file in files[-3:]:
            os.truncate(file, file.stat().st_size // 2)
    return (*sweeps.run(out), rows_of(out))


def half_written(sweeps):
    """A run whose last row is half there."""
    out = sweeps.folder / "half"
    sweeps.finish(out)
    text = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text(text[: text.rindex('"id"') + 40])
    return (*sweeps.run(out), rows_of(out))


def changed(sweeps):
    """A finished run that is resumed with another config."""
    out = sweeps.folder / "half"
    return (*sweeps.run(out, "--set", "defenses.strengths=0.5"), rows_of(out))


def stopped(sweeps, number):
    """A run that is asked to end."""
    out = sweeps.folder / f"stopped-{number}"
    process = sweeps.start(out)
    while process.poll() is None and not list(out.glob("checkpoints/attack-*/[3-9]")):
        time.sleep(0.005)
    process.send_signal(number)
    status = process.wait()
    said = (sweeps.folder / "log").read_text().splitlines()
    sweeps.finish(out)
    return status, said, rows_of(out)


def faults(sweeps, sizes, smoke):
    """Name -> (exit status, what was said, rows in the end), None where it cannot be tried."""
    found = {
        "half-written last row": half_written(sweeps),
        "another config": changed(sweeps),
    }
    if smoke:
        return found
    return found | {
        "SIGTERM": stopped(sweeps, signal.SIGTERM),
        "SIGINT": stopped(sweeps, signal.SIGINT),
        "all checkpoints damaged": damaged(sweeps),
        "directory that cannot be written": read_only(sweeps),
        **{f"disk of {size} kB": full(sweeps, size) for size in sizes},
    }


def outcome(found, wanted, folder):
    """What came of a fault, as facts."""
    if found is None:
        return {"status": None, "said": "not tried: no right to mount a disk", "rows_kept": None}
    status, said, rows = found
    line = next((each for each in reversed(said) if each.startswith("madjax: ")), "")
    return {"status": status, "said": line.replace(str(folder), ""), "rows_kept": rows == wanted}


def main():
    """Count what is lost, print and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--epochs", type=int, default=12, help="of each network")
    parser.add_argument("--sizes", type=int, nargs="+", default=(4, 1000, 3000), help="in kB")
    parser.add_argument("--out", type=Path)
    options = parse(parser, kills=1, epochs=4)
    with tempfile.TemporaryDirectory() as place:
        sweeps = Sweeps(Path(place), options.epochs)
        alone = sweeps.folder / "alone"
        if not options.smoke:
            sweeps.finish(sweeps.folder / "warm")  # which compiles
        whole = seconds(lambda: sweeps.finish(alone))
        idle = seconds(lambda: sweeps.finish(alone))  # which has nothing to do
        wanted = rows_of(alone)
        killed = kill(sweeps, options.kills, options.seed, wanted[0], whole, idle)
        found = faults(sweeps, options.sizes, options.smoke)
        each = {name: outcome(value, wanted, sweeps.folder) for name, value in found.items()}
    took = {"whole": round(whole, 1), "without_work": round(idle, 1)}
    results = {"killed": killed, "faults": each, "seconds_of_a_command": took}
    print(table(results))
    if options.out:
        write(options.out, options, {"results": results}, table(results))
    if lost_by(killed) or any(facts["rows_kept"] is False for facts in each.values()):
        raise SystemExit("rows were lost, doubled or changed")


def lost_by(killed):
    """How many rows were not as they should be."""
    return killed["rows_lost"] + killed["rows_doubled"] + killed["rows_differing"]


def table(results):
    """The outcome of each fault."""
    killed = results["killed"]
    moments = ", ".join(f"{what} {number}" for what, number in sorted(killed["moments"].items()))
    kept = "NO" if lost_by(killed) else "yes"
    lines = [(f"{killed['kills']} x kill -9 ({moments})", "-9", kept, "")]
    for name, facts in results["faults"].items():
        kept = {True: "yes", False: "NO", None: "-"}[facts["rows_kept"]]
        lines.append((name, str(facts["status"]), kept, facts["said"]))
    return markdown(("fault", "exit status", "rows as if undisturbed", "last line"), lines)


if __name__ == "__main__":
    main()
