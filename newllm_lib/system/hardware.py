"""What this machine is, and which number format its matrix products should use, with the reason."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from newllm_lib import __version__
from newllm_lib.errors import ConfigError

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU instruction sets with native bfloat16 products; without them bfloat16 is emulated and slow."""
FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16"})
"""CPU instruction sets with native float16 products."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d{2,3})")
"""As `torch.cuda.get_arch_list` names what it was built for."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about the device a run uses; nothing here is timed."""

    device: str
    """cpu, cuda:0, ... (a torch device)."""
    name: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    memory_bytes: int = 0
    """Memory that a process can use: of the GPU where there is one, else of the machine."""
    cpu_flags: frozenset[str] = field(default=frozenset())
    threads: int = 1
    passed_over: str = ""
    """Why a GPU that is there is not used; "" where none is."""

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.split(":")[0]


@dataclass(frozen=True)
class Precision:
    """A number format for the matrix products; weights, context, LayerNorm and loss stay FP32."""

    name: str
    reason: str
    substituted: bool = False
    """Whether the requested format was replaced by the nearest one that the hardware has."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of the products."""
        return DTYPES[self.name]

    def autocast(self, device_type: str) -> torch.autocast:
        """The context in which matrix products run in this format."""
        return torch.autocast(device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self, device_kind: str, init_scale: float = 65536.0) -> torch.amp.GradScaler:
        """A new loss scaler for a device of this kind (cpu or cuda): enabled for FP16 only.

        init_scale: the loss scale of the first step.
        """
        return torch.amp.GradScaler(device_kind, init_scale=init_scale, enabled=self.name == "fp16")


def detect(device: str = "auto", threads: int | None = None) -> Machine:
    """The machine as torch sees it; ConfigError for a device that is not there, or that torch has no kernels for.

    auto: the first GPU, or the CPU where there is none or torch has no kernels for it.
    """
    passed_over = ""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        passed_over = missing_kernels(0) if device == "cuda" else ""
        device = "cpu" if passed_over else device
    threads = threads or torch.get_num_threads()
    if device == "cpu":
        facts = {"memory_bytes": _ram_bytes(), "cpu_flags": cpu_flags(), "passed_over": passed_over}
        return Machine(device="cpu", name=cpu_name(), threads=threads, **facts)
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = device, 0
    if kind != "cuda" or index >= torch.cuda.device_count():
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ConfigError(f"device = {device!r}: must be auto, {', '.join(there)} on this machine")
    if why := missing_kernels(index):
        raise ConfigError(f"device = {device!r}: {why}; use device=cpu (in the shell --device cpu)")
    properties = torch.cuda.get_device_properties(index)
    return Machine(
        device=f"cuda:{index}",
        name=properties.name,
        capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        cpu_flags=cpu_flags(),
        threads=threads,
    )


def missing_kernels(index: int) -> str:
    """Why this build of torch cannot compute on a GPU, naming both; "" where it can.

    A kernel for capability X.Y (sm_XY) runs on X.Z with Z at least Y; one that the driver still compiles (compute_XY)
    runs on everything from X.Y on.
    """
    properties, built = torch.cuda.get_device_properties(index), torch.cuda.get_arch_list()
    there = (properties.major, properties.minor)
    for kind, number in (found.groups() for found in map(_ARCHITECTURE.fullmatch, built) if found):
        made_for = (int(number[:-1]), int(number[-1]))
        if made_for <= there and (kind == "compute" or made_for[0] == there[0]):
            return ""
    if not built:  # a build that does not say
        return ""
    return (
        f"{properties.name} has compute capability {there[0]}.{there[1]}, for which this torch ({torch.__version__}) "
        f"was not built: it has {', '.join(built)}"
    )


def choose_precision(requested: str, machine: Machine, emulate: bool = False) -> Precision:
    """The format to use for `requested` (auto, fp32, bf16, fp16) on a machine, and why.

    `emulate` keeps a format that is not native: torch then rounds to it and accumulates in FP32, slowly. GPUs are
    judged by compute capability: `torch.cuda.is_bf16_supported()` says yes on a T4, which emulates it.
    """
    if requested not in ("auto", *DTYPES):
        raise ConfigError(f"precision = {requested!r}: must be one of auto, {', '.join(DTYPES)}")
    native, why = _cuda_formats(machine) if machine.kind == "cuda" else _cpu_formats(machine)
    best = native[0]
    if requested == "auto":
        return Precision(best, why)
    if requested in native:
        return Precision(requested, "as requested")
    if emulate:
        return Precision(requested, f"not native to {machine.name}: emulated, its rounding is real, its speed is not")
    return Precision(best, f"{requested} is not native to {machine.name}; nearest is {best}: {why}", substituted=True)


def native_formats(machine: Machine) -> list[str]:
    """The formats that a machine computes in without emulating them; the one that `choose_precision` prefers first."""
    return (_cuda_formats(machine) if machine.kind == "cuda" else _cpu_formats(machine))[0]


def _cuda_formats(machine: Machine) -> tuple[list[str], str]:
    major, minor = machine.capability
    shown = f"compute capability {major}.{minor}"
    if machine.capability >= (8, 0):
        return ["bf16", "fp16", "fp32"], f"{machine.name}, {shown}, has native bfloat16 (8.0 or above)"
    if machine.capability >= (5, 3):
        return ["fp16", "fp32"], f"{machine.name}, {shown}, has float16 but no native bfloat16 (below 8.0)"
    return ["fp32"], f"{machine.name}, {shown}, has no native 16-bit arithmetic"


def _cpu_formats(machine: Machine) -> tuple[list[str], str]:
    fp16 = ["fp16"] if machine.cpu_flags & FP16_FLAGS else []  # never by its flag alone: it may be slower than fp32
    flags = sorted(machine.cpu_flags & BF16_FLAGS)
    if flags:
        return ["bf16", "fp32", *fp16], f"{machine.name} has {' and '.join(flags)}"
    return ["fp32", *fp16], f"{machine.name} has neither avx512_bf16 nor amx_bf16"


@contextmanager
def exact_products() -> Iterator[None]:
    """Let FP32 products of a GPU keep all of FP32 inside, whatever the process allows it: TF32 keeps 10 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads inside, and as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_batch_size(machine: Machine) -> int:
    """Sequences a step where the recipe leaves it open: few on a CPU, whose rate saturates early, more on a GPU."""
    return 128 if machine.kind == "cpu" else 256


def default_eval_batch_size(kind: str) -> int:
    """Sequences the evaluation takes at a time on a device of this kind: a GPU has room for more, and time for few."""
    return 256 if kind == "cpu" else 2048


def cpu_flags() -> frozenset[str]:
    """Instruction set flags as Linux lists them; none where it is not Linux."""
    return frozenset((_proc_line("/proc/cpuinfo", "flags") or "").split())


def cpu_name() -> str:
    """Model name of the processor."""
    return _proc_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _proc_line(path: str, key: str) -> str | None:
    """The value of the first line 'key : value' of a file that Linux keeps, None elsewhere."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def environment(machine: Machine | None) -> dict[str, Any]:
    """What a reader needs to repeat a run: versions, commit, device, memory; None = the run is of another machine."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["newllm_lib"] = __version__
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": machine and machine.device,
        "device_name": machine and machine.name,
        "capability": machine and machine.capability,
        "threads": machine and machine.threads,
        "usable_memory_bytes": machine and machine.memory_bytes,
        **(_cuda_facts() if machine and machine.kind == "cuda" else {}),
    }


def _cuda_facts() -> dict[str, Any]:
    """What else decides the figures of a GPU."""
    return {
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
        "fp32_products": torch.backends.cuda.matmul.fp32_precision,  # tf32, where the process allows it
    }


def _driver_version(path: str = "/proc/driver/nvidia/version") -> str | None:
    """NVIDIA's driver, as Linux tells it; None elsewhere."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path(path).read_text())
    except OSError:
        return None
    return found and found[1]


def _git_commit() -> str | None:
    """Commit of the library's checkout, with '+' where files differ from it; None outside a checkout of its own."""

    place = Path(__file__).resolve()
    folder = place.parents[1]  # of the whole package

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(place.relative_to(folder)))  # inside another project's checkout?
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
