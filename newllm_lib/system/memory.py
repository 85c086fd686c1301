"""How much memory a device can still give, how much was used at most, and what to do when it runs out."""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch

from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import Machine

_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where a container's limit and use stand (control groups version 2 and 1), and in memory.stat what of the use is only
cached files; a process that passes the limit is killed."""


OUT_OF_MEMORY = (
    "out of memory",  # CUDA's allocator and driver, cuBLASLt, NCCL
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudaerrormemoryallocation",
    "not enough memory",  # torch's CPU allocator on Windows
    "can't allocate memory",  # the same on Linux
    "cannot allocate memory",  # the system's own words, as mmap gives them
    "unable to allocate",  # NumPy
)
"""How errors say, in lower case, that memory has run out, besides by their type."""


def free_memory_bytes(machine: Machine) -> int | None:
    """Memory that can still be taken, of the GPU or of the machine (or container); None where no system says it."""
    if machine.kind == "cuda":
        return torch.cuda.mem_get_info(machine.device)[0]
    free = [value for value in (_file_bytes("/proc/meminfo", "MemAvailable"), *_container_bytes()) if value is not None]
    return min(free, default=None)


def _container_bytes() -> list[int]:
    """What each limit that the system sets on this container still leaves."""
    found = []
    for folder, limit, used, cached in _CONTROL_GROUPS:
        try:
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another version, or "max": no limit
            continue
        found.append(max(0, left + int(statistics.get(cached, 0))))
    return found


def _file_bytes(path: str, key: str) -> int | None:
    """The value of the line 'key: N kB' of a file that Linux keeps; None elsewhere."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)


class GPUMemory:
    """Counts what torch's allocator reserves: that, not what tensors hold, is gone for others."""

    overcommits = False
    """Whether too large a step is killed instead of refused."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self.clear()
        self.usable_bytes = free_memory_bytes(machine) + torch.cuda.memory_reserved(machine.device)

    def start(self) -> None:
        """Begin a new peak."""
        reset_peak_memory(self._machine)

    def peak_bytes(self) -> int | None:
        """Most memory that was reserved since `start`, what was held before it included."""
        return torch.cuda.max_memory_reserved(self._machine.device)

    def clear(self) -> None:
        """Let go of what nothing uses any more."""
        gc.collect()
        torch.cuda.empty_cache()


class ProcessMemory:
    """Counts by how much the resident memory of this process grows.

    What earlier work has freed must be back with the system first: used again, it would not show as growth.
    """

    overcommits = True

    def __init__(self, machine: Machine):
        self.clear()
        self._before: int | None = None
        free = free_memory_bytes(machine)
        self.usable_bytes = machine.memory_bytes // 2 if free is None else free

    def start(self) -> None:
        """Begin a new peak, where the system lets a process do so (Linux; see proc(5), clear_refs)."""
        self._before = _file_bytes("/proc/self/status", "VmRSS") if _give_back_freed() else None
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._before = None

    def peak_bytes(self) -> int | None:
        """Most growth since `start`; None where the system does not say, or growth would say too little."""
        peak = _file_bytes("/proc/self/status", "VmHWM")
        return None if peak is None or self._before is None else max(0, peak - self._before)

    def clear(self) -> None:
        """Let go of what nothing uses any more."""
        gc.collect()
        BUFFERS.release()
        _give_back_freed()


def _give_back_freed() -> bool:
    """Have the C library return to the system what it keeps of freed memory; whether it can (glibc, TCMalloc).

    Another library may be loaded in the place of glibc's functions, whose own one has nothing to give back then.
    """
    try:
        loaded, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        if ctypes.cast(loaded.malloc, ctypes.c_void_p).value == ctypes.cast(glibc.malloc, ctypes.c_void_p).value:
            loaded.malloc_trim(0)
        else:
            loaded.MallocExtension_ReleaseFreeMemory()
    except (AttributeError, OSError, TypeError):
        return False
    return True


def memory_of(machine: Machine) -> GPUMemory | ProcessMemory:
    """The memory that a run on this machine uses."""
    return GPUMemory(machine) if machine.kind == "cuda" else ProcessMemory(machine)


def fewer_rows(rows: int, failure: str) -> int:
    """Half as many rows (rounded up) to compute at a time after memory ran out; MemoryError where it was one row.

    Frees what the failed try has left behind. Call it outside of the `except` block, whose traceback keeps the tensors
    of the try alive; failure: what its error said.
    """
    gc.collect()
    BUFFERS.release()
    torch.cuda.empty_cache()
    if rows == 1:
        raise MemoryError(
            f"memory ran out with one sequence at a time ({' '.join(failure.split())[:300]}). Less is needed by a "
            "smaller model (hidden_dim, num_layers, vocab_size) and by a shorter sequence_length"
        )
    return -(-rows // 2)


def peak_memory_bytes(machine: Machine) -> int:
    """GPU: most memory that tensors held at once. CPU: most resident memory of this process since it started."""
    if machine.kind == "cuda":
        return torch.cuda.max_memory_allocated(machine.device)
    peak = _file_bytes("/proc/self/status", "VmHWM")  # ru_maxrss would count the parent's memory at the start too
    if peak:
        return peak
    import resource  # POSIX only, and so imported where it is used

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if platform.system() == "Darwin" else 1024)


def reset_peak_memory(machine: Machine) -> None:
    """Let the next peak of a GPU start from what is held now; a CPU process's peak cannot be reset."""
    if machine.kind == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the machine's memory has run out, in any of the usual wordings.

    Before another try leave the `except` block: its traceback keeps the tensors of the failed one alive.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
