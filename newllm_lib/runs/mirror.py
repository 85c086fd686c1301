"""A second, verified copy of a run, kept up to date while it trains: on a drive that may be slow, full, or gone.

Training never waits for the copy, and never ends because of it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from newllm_lib.errors import ChangedError, ConfigError
from newllm_lib.reporting.formatting import time_span
from newllm_lib.reporting.sync_status import SyncStatus
from newllm_lib.runs.mirror_copy import RunCopy

PAUSE_SECONDS = 60.0
"""Between the starts of two copies while a run trains: a drive may keep every replaced file in its bin for weeks."""
STALL_SECONDS = 60.0
"""Without a piece of a file copied, after which a drive counts as hanging."""
_PATIENCE_SECONDS = 1.0
"""After which the user is told what is waited for."""
_ATTEMPTS = 3
"""For files that are replaced just while they are copied."""

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there; on Google Drive empty its bin too"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "allow writing there"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTCONN, errno.EIO, errno.ESTALE), "is the drive still mounted?"),
}


class _Problem(NamedTuple):
    kind: str
    reason: str


class _AbandonedError(Exception):
    """Nobody waits for this copy any more."""


def check_mirror_dir(folder: Path, mirror_dir: str | Path) -> None:
    """ConfigError where the copy of a run's folder cannot be kept: `mirror_dir` is no folder, or holds the run."""
    if not Path(mirror_dir).is_dir():  # never made here: under a drive that is not mounted it would be no copy
        raise ConfigError(
            f"mirror_dir = {str(mirror_dir)!r}: must be a folder that exists; make it, or mount its drive"
        )
    if Path(mirror_dir).resolve() == folder.parent.resolve():
        raise ConfigError(f"mirror_dir = {str(mirror_dir)!r}: must be another folder than results_dir")


class Mirror:
    """Keeps the copy of one run up to date in a thread of its own.

    `restore` before the run starts, `request` after each save, `close` at the end; `safety` at any time.
    """

    def __init__(
        self,
        folder: Path,
        mirror_dir: str | Path,
        identity: str,
        *,
        pause: float = PAUSE_SECONDS,
        retry: float = PAUSE_SECONDS,
        clock: Callable[[], float] = time.time,
    ):
        """ConfigError when `mirror_dir` is no folder, or the one that holds the run.

        pause, retry: seconds between copies, and after one that failed. clock: seconds since 1970.
        """
        check_mirror_dir(folder, mirror_dir)
        self.place = Path(mirror_dir) / folder.name
        self._copy = RunCopy(folder, self.place, identity, self._alive, clock)
        self._pause, self._retry, self._clock = pause, retry, clock
        self._changed = threading.Condition()  # guards what follows
        self._thread: threading.Thread | None = None
        self._wanted = self._copying = self._closing = self._abandoned = False
        self._alive_at = 0.0
        self._not_before, self._again_at = -math.inf, math.inf  # for a copy that is wanted, and one after a failure
        self._synced: tuple[float, int] | None = None  # when, and which step
        self._problem: _Problem | None = None

    def restore(self, tell: Callable[[str], None]) -> None:
        """Bring the run back where its copy is ahead, as `RunCopy.restore` does, and say so through `tell`."""
        self._synced = self._copy.restore(tell)
        if self._synced:
            ago, step = time_span(self._clock() - self._synced[0]), self._synced[1]
            tell(f"brought back from {self.place}: step {step:,}, copied {ago} ago")

    def request(self) -> None:
        """Something was saved: copy it soon. Returns at once; while a copy is under way, one more is noted."""
        with self._changed:
            self._wanted = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, tell: Callable[[str], None] = lambda text: None, stall: float = STALL_SECONDS) -> SyncStatus:
        """Copy what is left, end, and `tell` how that went; KeyboardInterrupt ends the waiting only.

        stall: seconds without progress after which it is given up.
        """
        with self._changed:
            self._closing, self._alive_at = True, time.monotonic()
            self.request()
        with contextlib.suppress(KeyboardInterrupt):
            self._wait(_PATIENCE_SECONDS, stall)
            if self._pending():
                tell(f"copying the last state to {self.place} …")
                self._wait(math.inf, stall)
        with self._changed:
            if self._pending():
                self._abandoned = True
                self._problem = self._problem or _Problem("abandoned", "the last copy was given up")
        safety = self.safety()
        tell(f"{'' if safety.safe else 'warning: '}copy in {self.place}: {safety.text}")
        return safety

    def _wait(self, seconds: float, stall: float) -> None:
        """Until nothing is left to copy, for so long, or until nothing moves any more."""
        ends = time.monotonic() + seconds
        with self._changed:
            while self._pending() and time.monotonic() < ends and time.monotonic() - self._alive_at < stall:
                self._changed.wait(0.2)

    def _pending(self) -> bool:
        return self._wanted or self._copying

    def safety(self) -> SyncStatus:
        """How safe the work is at this moment."""
        with self._changed:
            problem, synced, copying = self._problem, self._synced, self._copying
            complete = self._closing and synced and not problem and not self._pending()
            if copying and time.monotonic() - self._alive_at > STALL_SECONDS:
                problem = _Problem("stalled", "the drive does not answer")
        ago = time_span(self._clock() - synced[0]) if synced else ""
        if problem and synced:
            text = f"NOT synced for {ago}: {problem.reason}; the last copy is of step {synced[1]:,}"
            return SyncStatus(problem.kind, text, safe=False)
        if problem:
            return SyncStatus(problem.kind, f"NOT synced: {problem.reason}; only on this machine", safe=False)
        if copying:
            return SyncStatus(
                "copying", f"copying (the last copy, of step {synced[1]:,}, is {ago} old)" if synced else "copying"
            )
        if complete:  # said for good, where "ago" would soon be wrong
            return SyncStatus("synced", f"complete and verified (step {synced[1]:,})")
        if synced:
            return SyncStatus("synced", f"synced {ago} ago (step {synced[1]:,})")
        return SyncStatus("local", "only on this machine so far")

    # --- in the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """One copy after another, until closed."""
        while True:
            with self._changed:
                while (left := self._next_start() - time.monotonic()) > 0:
                    if self._closing:
                        return
                    self._changed.wait(left if left < math.inf else None)
                self._wanted, self._copying, self._alive_at = False, True, time.monotonic()
                self._not_before = self._alive_at + self._pause
            problem, synced = self._try()
            with self._changed:
                self._copying = False
                self._synced = synced or self._synced
                if not self._abandoned:
                    self._problem = problem
                self._again_at = time.monotonic() + self._retry if problem else math.inf  # it may be back by then
                self._changed.notify_all()

    def _next_start(self) -> float:
        """When a copy is due, by the monotonic clock; infinity while none is."""
        if self._wanted:
            return -math.inf if self._closing else min(self._not_before, self._again_at)
        return math.inf if self._closing else self._again_at

    def _try(self) -> tuple[_Problem | None, tuple[float, int] | None]:
        """One copy: what went wrong with it, which never ends a training, or when it was made and of which step."""
        problem = None
        for _ in range(_ATTEMPTS):
            try:
                step = self._copy.update()
                return None, (self._clock(), step)
            except ChangedError as error:
                problem = _Problem("changing", str(error))
            except OSError as error:
                return _told(error), None
            except Exception as error:
                return _Problem(type(error).__name__, str(error) or type(error).__name__), None
        return problem, None

    def _alive(self) -> None:
        """Called by the copy between its pieces."""
        self._alive_at = time.monotonic()
        if self._abandoned:
            raise _AbandonedError


def _told(error: OSError) -> _Problem:
    where = f"{error.filename}: " if error.filename else ""
    remedy = f" ({_REMEDIES[error.errno]})" if error.errno in _REMEDIES else ""
    return _Problem(errno.errorcode.get(error.errno or 0, "OSError"), f"{where}{error.strerror or error}{remedy}")
