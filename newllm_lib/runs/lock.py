"""One writer for each run: the lock beside a run's folder, held for as long as a process may write there.

The operating system's lock decides. What the file says (host, process, since when) is for the message, and stands in
for the lock on file systems that have none, as some network drives.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from newllm_lib.errors import ConfigError, RunInUseError
from newllm_lib.reporting.formatting import duration
from newllm_lib.system.files import file_errors, make_folder

_RENEW_SECONDS = 60
_STALE_SECONDS = 600
"""A holder that has not renewed its time stamp for so long is taken for dead where no lock can tell."""


def lock_path(folder: Path) -> Path:
    """The lock of a run's folder: beside it, so that it is in no bundle and no copy."""
    return folder.parent / f".{folder.name}.lock"


class RunLock:
    """The right to write to one run's folder; a context manager that gives it back."""

    def __init__(self, log: Callable[[str], None]):
        """log: gets a line where a lock cannot be had or is taken over."""
        self._log = log
        self._lock: FileLock | None = None
        self._path: Path | None = None
        self._renewal: threading.Thread | None = None
        self._released = threading.Event()
        self._started = time.time()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    @file_errors()
    def take(self, folder: Path) -> None:
        """Lock a run's folder, which need not exist yet. RunInUseError where another process or thread has it."""
        path = lock_path(folder)
        make_folder(path.parent)
        holder = _read(path)  # before the lock is tried: some versions of filelock empty the file
        lock = FileLock(str(path), timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunInUseError(_in_use(folder, holder)) from None
        except (OSError, NotImplementedError) as error:
            self._log(
                f"warning: {path.parent}: this file system cannot lock files ({error}): make sure that nothing else "
                f"trains {folder.name}"
            )
            if _is_alive(holder):
                raise RunInUseError(_in_use(folder, holder)) from None
        else:
            self._lock = lock
        self._tell_takeover(folder, holder)
        self._path, self._started = path, time.time()
        self._write()
        self._renewal = threading.Thread(target=self._renew, name=f"lock of {folder.name}", daemon=True)
        self._renewal.start()

    def release(self) -> None:
        """Let others write there; again and again without harm."""
        if self._renewal is not None:
            self._released.set()
            self._renewal.join()
            self._renewal = None
            with contextlib.suppress(OSError):
                self._path.write_text("")
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _tell_takeover(self, folder: Path, holder: dict[str, Any]) -> None:
        """A process of this host that left its name was killed, which needs no line: its lock is gone with it."""
        if holder and (self._lock is None or holder["host"] != socket.gethostname()):
            ago = duration(max(0.0, time.time() - holder["renewed"]))
            self._log(f"taking over {folder} from {_name_of(holder)}, which was last seen {ago} ago")

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            self._write()

    def _write(self) -> None:
        """Best effort: the text only makes messages better."""
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": self._started, "renewed": time.time()}
        with contextlib.suppress(OSError):
            self._path.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def refuse_several_processes() -> None:
    """ConfigError under torchrun with more than one process: each would train the same run."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count.isdecimal() and int(count) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {count}: this is one of {count} processes that torchrun started, and a run trains in one "
            "process on one device: start it once, without torchrun"
        )


def _read(path: Path) -> dict[str, Any]:
    """Who holds a lock, or held it and did not give it back; empty where nothing that makes sense is written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        facts = {"host": str(found["host"]), "pid": int(found["pid"])}
        return facts | {name: float(found[name]) for name in ("started", "renewed")}
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that the text names may still write, where no lock can tell."""
    if not holder or holder["host"] != socket.gethostname() or time.time() - holder["renewed"] > _STALE_SECONDS:
        return False
    try:
        os.kill(holder["pid"], 0)  # asks only
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _name_of(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        with contextlib.suppress(OverflowError, ValueError, OSError):
            since = datetime.fromtimestamp(holder["started"]).strftime("%Y-%m-%d %H:%M:%S")
            who = f"{_name_of(holder)}, since {since}"
    return f"{folder}: is being trained by {who}. Wait until it has ended, stop it, or give this run another name"
