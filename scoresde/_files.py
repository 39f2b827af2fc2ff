"""Files that are complete or absent: atomic writing, checksums, and a lock for one writer of a folder.

A file is written under a temporary name, flushed to the disk and then renamed, so that a file under its final name is
complete. Temporary names and locks contain the process that owns them; only those of dead processes are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

SILENT = 300.0  # seconds without a sign of life after which a process of another machine counts as dead

_BEAT = 30.0  # seconds between signs of life

_TEMPORARY = re.compile(r"\..+\.([\w-]+)\.(\d+)\.(\d+)\.(\d+)\.[0-9a-f]{16}\.tmp")


@dataclass(frozen=True)
class Owner:
    """A process that writes files.

    Arguments:
        host: Name of the machine.
        space: Number of the process's namespace, because containers on one machine number their processes separately.
        pid: Number of the process.
        started: Start of the process in ticks since the machine was booted, because numbers of processes are reused.
    """

    host: str
    space: int
    pid: int
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def current(cls) -> Owner:
        """The owner that is this process."""
        host = re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:64] or "unknown"
        return cls(host, _space(), os.getpid(), _status(os.getpid())[1])

    @property
    def is_near(self) -> bool:
        """Whether this process can see the other one: on the same machine and in the same namespace."""
        mine = Owner.current()
        return (self.host, self.space) == (mine.host, mine.space) and os.name == "posix"

    def is_dead(self, file: Path) -> bool:
        """Whether the process has ended.

        Arguments:
            file: File of the process, whose age decides about processes of other machines.
        """
        if not self.is_near:
            return self != Owner.current() and _silence(file) > SILENT
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _status(self.pid)
        return state in "ZX" or (bool(started) and started != self.started)


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: at any moment `path` is the old file or the complete new file.

    Arguments:
        path: Path of the file; its folder must exist. The target of a symbolic link is written, the link stays.
        data: Contents.
    """
    target = Path(os.path.realpath(path))
    try:
        temporary, file = _create(target)
        try:
            with os.fdopen(file, "wb") as out:
                with suppress(FileNotFoundError, AttributeError):
                    os.fchmod(file, stat.S_IMODE(target.stat().st_mode))
                out.write(data)
                out.flush()
                os.fsync(file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; nothing was written", str(path)) from error
    if os.name == "posix":  # the new name reaches the disk only when the folder is flushed
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def digest(text: str) -> str:
    """Checksum of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def remove_torn(folder: Path) -> None:
    """Remove the temporary files of dead processes.

    Arguments:
        folder: Folder of the files.
    """
    for file in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(file.name)
        with suppress(FileNotFoundError):
            if match and Owner(match[1], *map(int, match.groups()[1:])).is_dead(file):
                file.unlink()


class Lock:
    """A file that says which process writes to a folder, so that no other process does.

    Arguments:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = ""
        self._pid = 0
        self._beat = 0.0

    @property
    def held(self) -> bool:
        """Whether this object took the lock in this process; a fork does not inherit it."""
        return bool(self._text) and self._pid == os.getpid()

    def acquire(self) -> None:
        """Take the lock, from a dead process if need be; raise an error if another process has it."""
        if self.held:
            self.check()
            return
        text = json.dumps({**asdict(Owner.current()), "token": secrets.token_hex(8)})
        while not self._take(text):
            found = _read(self.path)
            if found is not None and not self._discard_if_dead(found):
                owner = _owner(found)
                hint = (
                    ""
                    if owner is not None and owner.is_near
                    else (f" If it has ended, wait {SILENT / 60:.0f} minutes or delete {self.path}.")
                )
                raise RuntimeError(
                    f"{owner or 'another process'} is writing to {self.path.parent}; use another folder, or stop that "
                    f"process.{hint}"
                )
        self._text, self._pid, self._beat = text, os.getpid(), time.monotonic()

    def check(self) -> None:
        """Raise an error if another process took the lock, because it thought that this process was dead."""
        found = _read(self.path)
        if found is None:  # deleted by hand
            self._text = ""
            self.acquire()
        elif found != self._text:
            raise RuntimeError(
                f"{_owner(found) or 'another process'} took over {self.path.parent} from this process; nothing was "
                f"written. Only one process may write to a folder."
            )
        else:
            try:
                os.utime(self.path)
            except OSError as error:  # whose text has no path
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self._beat = time.monotonic()

    def beat(self) -> None:
        """Give a sign of life from time to time."""
        if self.held and time.monotonic() - self._beat > _BEAT:
            self.check()

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self.held and _read(self.path) == self._text:
            with suppress(OSError):  # a disk that became read-only keeps it; the lock of a dead process does not count
                self.path.unlink()
        self._text = ""

    def _take(self, text: str) -> bool:
        try:
            file = os.open(self.path, _EXCLUSIVE, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(file, "w") as out:
                out.write(text)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _discard_if_dead(self, found: str) -> bool:
        """Remove the lock of a dead process, unless another process has replaced it meanwhile."""
        owner = _owner(found)
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            if not (_silence(self.path) > SILENT if owner is None else owner.is_dead(self.path)):
                return False
            os.rename(self.path, aside)
            if _read(aside) != found:  # that of a living process: put it back
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()
        except FileNotFoundError:
            pass
        return True


_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def _create(target: Path) -> tuple[Path, int]:
    """A new file beside `target` that no other process opens, and its descriptor."""
    me = Owner.current()
    name = f".{target.name[:100]}.{me.host}.{me.space}.{me.pid}.{me.started}.{secrets.token_hex(8)}.tmp"
    path = target.with_name(name)
    return path, os.open(path, _EXCLUSIVE, 0o666)


def _silence(file: Path) -> float:
    """Number of seconds since a file was changed, by the clock of its file system."""
    changed = file.stat().st_mtime
    probe, descriptor = _create(file)
    try:
        return os.fstat(descriptor).st_mtime - changed
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _owner(text: str) -> Owner | None:
    """Owner in the text of a lock; None if the text is not complete."""
    try:
        entries = json.loads(text)
        return Owner(str(entries["host"]), *(int(entries[name]) for name in ("space", "pid", "started")))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _space() -> int:
    try:
        digits = re.findall(r"\d+", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return 0
    return int(digits[0]) if digits else 0


def _status(pid: int) -> tuple[str, int]:
    """State of a process, one letter, and the time of its start; a space and 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return " ", 0
