"""Files: complete or absent, whoever dies, whatever the disk does, and one writer of a folder at a time."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scoresde import _files as files
from scoresde._files import Lock, Owner, remove_torn, write

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def child(work: Callable[[], object]) -> int:
    """Run a function in a fork; its exit status is 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def status(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# Writing.


def test_two_writers_never_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write_often(letter: bytes) -> None:
        for _ in range(100):
            write(path, letter * 10_000)
            assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000)

    both = [child(lambda letter=letter: write_often(letter)) for letter in (b"a", b"b")]  # type: ignore[misc]
    assert [status(pid) for pid in both] == [0, 0]
    assert names(tmp_path) == ["a"]


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")

    def overflow() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match=r"nothing was written: .*a'"):
            write(path, b"x" * 10_000)

    assert status(child(overflow)) == 0
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    victim, me = tmp_path / "victim", Owner.current()
    victim.write_text("mine")
    trap = tmp_path / f".a.{me.host}.{me.space}.{me.pid}.{me.started}.{'0' * 16}.tmp"
    trap.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(tmp_path / "a", b"other")
    assert victim.read_text() == "mine" and trap.is_symlink() and not (tmp_path / "a").exists()


def test_links_and_permissions_of_the_file_itself_stay(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    (tmp_path / "b").chmod(0o640)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").read_text() == "new"
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError, match="none/a"):
        write(tmp_path / "none" / "a", b"")


def test_only_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    me, dead = Owner.current(), child(lambda: None)
    assert status(dead) == 0

    def torn(owner: Owner, age: float = 0) -> str:
        text = f".step.{owner.host}.{owner.space}.{owner.pid}.{owner.started}.{'0' * 16}.tmp"
        (tmp_path / text).write_text("part")
        os.utime(tmp_path / text, (time.time() - age,) * 2)
        return text

    stay = [torn(me, 1e6), torn(Owner("elsewhere", 1, 3, 5), 10), torn(Owner("elsewhere", me.space, me.pid, 7))]
    gone = [torn(Owner(me.host, me.space, dead, 1)), torn(Owner("elsewhere", 1, 4, 5), 2 * files.SILENT)]
    if me.started:  # the number of a dead process is used again
        gone.append(torn(Owner(me.host, me.space, me.pid, me.started + 1)))
    (tmp_path / ".notes.tmp").write_text("mine")
    assert len({*stay, *gone}) == len(stay) + len(gone)
    remove_torn(tmp_path)
    assert names(tmp_path) == sorted([*stay, ".notes.tmp"])


# The lock.


def hold(path: Path, ready: Path) -> None:
    Lock(path).acquire()
    ready.touch()
    time.sleep(60)


def test_a_living_owner_is_named_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    path, ready = tmp_path / ".lock", tmp_path / "ready"
    pid = child(lambda: hold(path, ready))
    try:
        while not ready.exists():
            time.sleep(0.01)
        mine = Lock(path)
        with pytest.raises(RuntimeError, match=rf"process {pid} on .* is writing to .*stop that process\.$"):
            mine.acquire()
        assert not mine.held
    finally:
        os.kill(pid, signal.SIGKILL)
    if files._status(os.getpid())[1]:  # the system tells that a process was killed that is still in its table
        deadline = time.monotonic() + 10
        while files._status(pid)[0] not in "Z " and time.monotonic() < deadline:
            time.sleep(0.01)
        mine.acquire()
        assert status(pid) != 0
    else:
        assert status(pid) != 0
        mine.acquire()
    assert mine.held and str(os.getpid()) in path.read_text()
    mine.release()
    assert not mine.held and names(tmp_path) == ["ready"]


def test_one_process_has_one_lock_and_a_fork_none(tmp_path: Path) -> None:
    mine, other = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    mine.acquire()
    mine.acquire()
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
        other.acquire()

    def fork() -> None:
        assert not mine.held
        with pytest.raises(RuntimeError, match="is writing"):
            mine.acquire()
        mine.release()

    assert status(child(fork)) == 0 and mine.held and (tmp_path / ".lock").exists()
    mine.release()
    other.acquire()


def test_processes_of_other_machines_are_dead_after_a_silence(tmp_path: Path) -> None:
    path, mine = tmp_path / ".lock", Lock(tmp_path / ".lock")
    for text in (json.dumps({"host": "node7", "space": 1, "pid": 12, "started": 3}), "", "[" * 10_000):
        path.write_text(text)
        who = "process 12 on node7" if "node7" in text else "another process"
        with pytest.raises(RuntimeError, match=f"{who} is writing.*wait 5 minutes"):
            mine.acquire()
        os.utime(path, (time.time() - 2 * files.SILENT,) * 2)
        mine.acquire()
        mine.release()
    assert names(tmp_path) == []


def test_a_lock_that_was_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, mine = tmp_path / ".lock", Lock(tmp_path / ".lock")
    mine.acquire()
    os.utime(path, (0, 0))
    mine.beat()
    assert path.stat().st_mtime == 0, "signs of life are rare"
    monkeypatch.setattr(files, "_BEAT", -1.0)
    mine.beat()
    assert path.stat().st_mtime > 0
    path.unlink()
    mine.beat()
    assert path.exists()
    theirs = json.dumps({"host": "node7", "space": 1, "pid": 12, "started": 3})
    path.write_text(theirs)
    with pytest.raises(RuntimeError, match="process 12 on node7 took over"):
        mine.acquire()
    mine.release()
    assert path.read_text() == theirs, "and not removed"


def test_of_many_that_replace_a_dead_owner_one_wins(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for _ in range(5):
        dead = child(Lock(path).acquire)
        assert status(dead) == 0 and path.exists()

        def win() -> None:
            Lock(path).acquire()
            time.sleep(0.3)

        codes = [status(pid) for pid in [child(win) for _ in range(4)]]
        assert codes.count(0) == 1, codes
        path.unlink()
