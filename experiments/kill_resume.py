"""Interrupt a training run in every way; it must always resume, and end as the undisturbed run ends.

    python experiments/kill_resume.py               # 20 kills of each kind, a full disk and a read-only folder
    python experiments/kill_resume.py --kills 200
    python experiments/kill_resume.py --quick       # seconds, for CI

Each run is a separate process, forked from this one. It saves after every second step, so that many kills happen while
a checkpoint is written. At the end weights, average, optimiser, times and generators must equal those of the
undisturbed run, to the bit.

* *One writer*: SIGKILL after a random number of steps, at a random time or while a file is written. After each kill
  every file with a checkpoint's name must load.
* *Two writers*: two processes train in one folder, and one of them is killed. The one without the lock is refused
  and tries again until the other one is dead.
* *Full disk*: the folder is a disk in memory that has space for two checkpoints and a half (without the right to mount
  one: a limit on the size of files). The run ends with an error, and resumes when there is space.
* *Read-only folder*: the disk becomes read-only during the run, and is read-only at the start of another one.

Measured on a busy core, 46 s. One writer: 11 of 20 kills interrupted a write, and after 19 there was a checkpoint to
resume from. Two writers: 16 of 20 kills hit the owner of the lock, 13 left files of a write, and 59 starts in the
folder of a living owner were refused. The full disk ended the run at the third checkpoint, the read-only one at the
next step that touched it, or before the first step. No checkpoint was damaged, no other writer was disturbed, and all
four results were equal to the undisturbed one in every part.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.training import Checkpoints, Hook, ProgressBar, Record, Trainer, Update, times
from scoresde.training.checkpoint import CheckpointError, load

STEPS = 120


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 256), nn.SiLU(), nn.Dropout(0.1), nn.Linear(256, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def trainer(folder: Path, init: int, *hooks: Hook) -> Trainer:
    random.seed(init)  # a fork has seeded it from the system
    torch.manual_seed(init)  # a resumed run starts with other weights and generators, which `resume` must replace
    model = ss.Denoiser(Net(), ss.VP(), predicts="eps")
    loss = ss.DSM(model, proposal=times.Stratified(times.LossAware(bins=8)))
    data = ss.Noise(0).normal((500, 2), 0)
    saved = Checkpoints(folder, every=2, keep=2)
    return Trainer(loss, data, batch=32, ema=0.99, update=Update(warmup=10), hooks=[saved, ProgressBar(False), *hooks])


def run(folder: Path, init: int, *hooks: Hook) -> None:
    """Resume and train to the end."""
    one = trainer(folder, init, *hooks)
    one.resume()
    one.fit(STEPS)


def insist(folder: Path, init: int, log: Path) -> None:
    """Resume and train to the end; while another process trains in the folder, try again, and write each refusal."""
    while True:
        try:
            with warnings.catch_warnings():
                # A checkpoint can be deleted by the other process between the list of files and its reading.
                warnings.filterwarnings("ignore", message="skipped a checkpoint: there is no checkpoint")
                run(folder, init)
            return
        except (RuntimeError, FileExistsError) as error:
            # The last two: the other process began, or wrote, between what this one read and its lock.
            known = ("is writing to", "took over", "has the checkpoints of a run", "another run wrote to")
            kind = next((words for words in known if words in str(error)), None)
            if kind is None:
                raise
            with log.open("a") as out:
                out.write(kind + "\n")
            time.sleep(0.01)


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> bool:
    """Wait for a process; return whether it ended without an error."""
    return os.waitpid(pid, 0)[1] == 0


def wait_for_progress(folder: Path, pids: list[int], kills: int, draw: random.Random) -> None:
    """Wait for a random number of steps, and then for a random time or the next write; or for a process to end."""

    def newest() -> int:
        return max(Checkpoints(folder).steps(), default=0)

    def running() -> bool:
        return all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in pids)

    goal = newest() + 2 * round(draw.expovariate(kills / (0.4 * STEPS)))
    while newest() < goal and running():
        time.sleep(0.002)
    if draw.random() < 0.4:
        time.sleep(draw.uniform(0, 0.05))
        return
    last = time.perf_counter() + 1
    while not list(folder.glob(".*.tmp")) and time.perf_counter() < last and running():
        pass


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare(quiet: Path, folder: Path) -> None:
    """Print which parts of the last states are equal; stop if one differs, or if something is left in the folder."""
    a, b = (Checkpoints(place).latest() for place in (quiet, folder))
    assert a is not None and b is not None and a[0] == b[0] == STEPS
    equal = {part: same(a[1][part], b[1][part]) for part in a[1]}
    print("  equal to the undisturbed run, to the bit: " + ", ".join(f"{part} {ok}" for part, ok in equal.items()))
    left = sorted(file.name for file in folder.iterdir() if file.suffix != ".safetensors")
    print(f"  other files left in the folder: {', '.join(left) or 'none'}")
    if not all(equal.values()) or left:
        sys.exit("the runs differ, or files are left")


def damaged(folder: Path) -> int:
    """Number of checkpoints that do not load."""
    bad = 0
    for step in Checkpoints(folder).steps():
        path = Checkpoints(folder).path(step)
        try:
            load(path)
        except CheckpointError:
            bad += path.exists()  # else a living process deleted it meanwhile
    return bad


def one_writer(quiet: Path, folder: Path, kills: int, draw: random.Random) -> None:
    resumed = torn = finished = bad = 0
    for k in range(kills):
        saved = Checkpoints(folder).latest() is not None  # a damaged file gives a warning, which is an error here
        resumed += saved
        pid = forked(lambda init=100 + k if saved else 1: run(folder, init))  # type: ignore[misc]
        wait_for_progress(folder, [pid], kills, draw)
        os.kill(pid, signal.SIGKILL)
        finished += ended(pid)
        torn += len(list(folder.glob(".*.tmp"))) > 0
        bad += damaged(folder)
    reached = max(Checkpoints(folder).steps(), default=0)
    assert ended(forked(lambda: run(folder, 999))), "the last run did not reach the end"
    print(
        f"one writer, {kills} kills: {resumed} with a checkpoint to resume from, {torn} interrupted a write, "
        f"{finished} after the end, {bad} damaged checkpoints; step {reached} of {STEPS} was reached before the last "
        f"start"
    )
    compare(quiet, folder)


def two_writers(quiet: Path, folder: Path, kills: int, draw: random.Random) -> None:
    log = folder.with_suffix(".log")
    log.touch()
    torn = bad = crashed = ended_well = owners = 0
    living: dict[int, None] = {}
    for _ in range(kills):
        for pid in list(living):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del living[pid]
                ended_well += 1
        while len(living) < 2:  # the same initial weights, because either may begin the run
            living[forked(lambda: insist(folder, 1, log))] = None
        wait_for_progress(folder, list(living), kills, draw)
        victim, text = draw.choice(list(living)), ""
        with suppress(FileNotFoundError):
            text = (folder / ".lock").read_text()
        holding = [pid for pid in living if f'"pid": {pid},' in text]
        if holding and draw.random() < 0.75:
            victim = holding[0]
        owners += victim in holding
        os.kill(victim, signal.SIGKILL)
        status = os.waitpid(victim, 0)[1]
        crashed += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
        del living[victim]
        torn += len(list(folder.glob(".*.tmp"))) > 0
        bad += damaged(folder)
    reached = max(Checkpoints(folder).steps(), default=0)
    crashed += sum(not ended(pid) for pid in living)
    assert ended(forked(lambda: insist(folder, 1, log))), "the last run did not reach the end"
    refused = Counter(log.read_text().splitlines())
    print(
        f"two writers, {kills} kills: {owners} of the owner of the lock, {torn} with files of a write, {bad} damaged "
        f"checkpoints, {crashed} writers that crashed; {sum(refused.values())} refusals; step {reached} of {STEPS} was "
        f"reached before the last writers"
    )
    compare(quiet, folder)
    if crashed or bad:
        sys.exit("a writer disturbed the other one")


class At(Hook):
    """A function that is called after a step."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.step, self.function = step, function

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if record.step == self.step:
            self.function()


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None] | None]:
    """A small disk in memory at a folder, and a function that changes its options; None without the right to do so."""
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)

    try:
        mount(f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(quiet: Path, folder: Path) -> None:
    size = Checkpoints(quiet).path(STEPS).stat().st_size
    pages = -(-size // 4096) * 4096
    message = folder.with_suffix(".txt")

    def stopped(*hooks: Hook) -> None:
        try:
            run(folder, 1, *hooks)
        except OSError as error:
            message.write_text(str(error).replace(str(folder), "."))

    with disk(folder, int(2.5 * pages) + 8192) as change:
        kind = "a full disk"
        if change is None:
            kind = "a limit on the size of files"
            stop = At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY)))
            assert ended(forked(lambda: stopped(stop)))
        else:
            assert ended(forked(stopped))
        steps = Checkpoints(folder).steps()
        print(f"{kind}: the run ended after step {max(steps)} with: {message.read_text()}")
        print(f"  {damaged(folder)} of {len(steps)} checkpoints are damaged")
        if change is not None:
            change(f"size={10 * pages}")
        assert ended(forked(lambda: run(folder, 999))), "the run did not go on"
        compare(quiet, folder)


def read_only(quiet: Path, folder: Path) -> None:
    message = folder.with_suffix(".txt")

    def stopped(*hooks: Hook) -> None:
        try:
            run(folder, 1, *hooks)
        except OSError as error:
            message.write_text(str(error).replace(str(folder), "."))

    with disk(folder, 1 << 24) as change:
        if change is None:
            print("a read-only folder: not measured, because this process may not mount a disk")
            return
        assert ended(forked(lambda: stopped(At(5, lambda: change("ro")))))
        print(f"a folder that becomes read-only: the run ended with: {message.read_text()}")
        print(f"  {damaged(folder)} of {len(Checkpoints(folder).steps())} checkpoints are damaged")
        begun: list[int] = []
        assert ended(forked(lambda: stopped(At(5, lambda: begun.append(1)))))
        print(f"a folder that is read-only: no step was made, and the error is: {message.read_text()}")
        change("rw")
        assert ended(forked(lambda: run(folder, 999))), "the run did not go on"
        compare(quiet, folder)


def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        trainer(root / "none", 0)  # imports accelerate, once for all forks
        quiet = root / "quiet"
        assert ended(forked(lambda: run(quiet, 1)))
        one_writer(quiet, root / "one", kills, draw)
        two_writers(quiet, root / "two", kills, draw)
        full_disk(quiet, root / "full")
        read_only(quiet, root / "read")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 kills of each kind, for CI")
    options = parser.parse_args()
    main(5 if options.quick else options.kills, options.seed)
