import subprocess
from types import SimpleNamespace

import pytest
import torch

from newllm_lib.errors import ConfigError
from newllm_lib.system import hardware
from newllm_lib.system.hardware import (
    Machine,
    choose_precision,
    default_batch_size,
    default_eval_batch_size,
    detect,
    environment,
    exact_products,
)
from newllm_lib.system.memory import is_out_of_memory, peak_memory_bytes


def gpu(name, *capability):
    return Machine(device="cuda:0", name=name, capability=capability, memory_bytes=16 * 2**30)


def cpu(*flags):
    return Machine(device="cpu", name="Some CPU", cpu_flags=frozenset(flags))


K40, P100, T4 = gpu("K40", 3, 5), gpu("P100", 6, 0), gpu("T4", 7, 5)
A100, L4, H100 = gpu("A100", 8, 0), gpu("L4", 8, 9), gpu("H100", 9, 0)
OLD_CPU, NEW_CPU = cpu("sse2", "avx2", "avx512f"), cpu("avx2", "avx512_bf16")


@pytest.mark.parametrize(
    ("machine", "auto", "bf16", "fp16"),
    [
        (K40, "fp32", "fp32", "fp32"),
        (P100, "fp16", "fp16", "fp16"),
        (T4, "fp16", "fp16", "fp16"),
        (A100, "bf16", "bf16", "fp16"),
        (L4, "bf16", "bf16", "fp16"),
        (H100, "bf16", "bf16", "fp16"),
        (OLD_CPU, "fp32", "fp32", "fp32"),
        (NEW_CPU, "bf16", "bf16", "bf16"),
        (cpu("amx_bf16"), "bf16", "bf16", "bf16"),
    ],
)
def test_precision_by_machine_and_request(machine, auto, bf16, fp16):
    for requested, expected in (("auto", auto), ("bf16", bf16), ("fp16", fp16), ("fp32", "fp32")):
        chosen = choose_precision(requested, machine)
        assert chosen.name == expected
        assert chosen.substituted == (requested not in ("auto", expected))
        assert (chosen.reason == "as requested") == (requested == expected)


@pytest.mark.parametrize(
    ("machine", "requested", "reason"),
    [
        (L4, "auto", "L4, compute capability 8.9, has native bfloat16 (8.0 or above)"),
        (T4, "auto", "T4, compute capability 7.5, has float16 but no native bfloat16 (below 8.0)"),
        (K40, "auto", "K40, compute capability 3.5, has no native 16-bit arithmetic"),
        (OLD_CPU, "auto", "Some CPU has neither avx512_bf16 nor amx_bf16"),
        (NEW_CPU, "auto", "Some CPU has avx512_bf16"),
        (cpu("amx_bf16", "avx512_bf16"), "auto", "Some CPU has amx_bf16 and avx512_bf16"),
        (
            T4,
            "bf16",
            "bf16 is not native to T4; nearest is fp16: "
            "T4, compute capability 7.5, has float16 but no native bfloat16 (below 8.0)",
        ),
        (
            OLD_CPU,
            "fp16",
            "fp16 is not native to Some CPU; nearest is fp32: Some CPU has neither avx512_bf16 nor amx_bf16",
        ),
    ],
)
def test_precision_gives_its_reason(machine, requested, reason):
    assert choose_precision(requested, machine).reason == reason


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_run_in_the_chosen_type(name, dtype):
    precision = choose_precision(name, NEW_CPU)
    assert precision.dtype is dtype
    x = torch.ones(2, 2)
    with precision.autocast("cpu"):
        assert (x @ x).dtype is dtype
    assert choose_precision("fp16", L4).dtype is torch.float16


def test_detect_the_cpu():
    machine = detect("cpu", threads=3)
    assert (machine.device, machine.kind, machine.capability, machine.threads) == ("cpu", "cpu", None, 3)
    assert machine.name
    assert machine.memory_bytes > 2**28
    assert detect("cpu").threads == torch.get_num_threads()


def test_auto_is_the_gpu_where_there_is_one():
    assert detect("auto").kind == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:2", "cpu:0", "meta", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError) as refused:
        detect(device)
    assert str(refused.value) == f"device = {device!r}: must be auto, cpu, cuda:0, cuda:1 on this machine"


def test_a_gpu_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"^device = 'cuda': must be auto, cpu on this machine$"):
        detect("cuda")


PASCAL_OUT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""What torch 2.11 for CUDA 12.8 and later is built for."""


def stand_in_gpu(monkeypatch, name, capability, built):
    major, minor = capability
    facts = SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 0), PASCAL_OUT, False),  # P100
        ((7, 0), PASCAL_OUT, False),  # V100: sm_75 is newer than it
        ((7, 5), PASCAL_OUT, True),  # T4
        ((8, 9), PASCAL_OUT, True),  # L4, by sm_86
        ((12, 1), PASCAL_OUT, True),
        ((11, 0), PASCAL_OUT, False),  # no kernel of its generation
        ((11, 0), [*PASCAL_OUT, "compute_100"], True),  # compiled by the driver
        ((9, 0), ["sm_90a"], False),  # H100 alone runs those, and a build has others too
        ((9, 0), ["sm_75", "sm_90a", "sm_90"], True),
        ((6, 0), [], True),  # a build that does not say
    ],
)
def test_a_gpu_runs_where_torch_was_built_for_it(monkeypatch, capability, built, runs):
    stand_in_gpu(monkeypatch, "Some GPU", capability, built)
    machine = detect("auto")
    assert machine.kind == ("cuda" if runs else "cpu")
    assert bool(machine.passed_over) == (not runs)
    if not runs:
        with pytest.raises(ConfigError, match="device = 'cuda'"):
            detect("cuda")


def test_the_refusal_names_gpu_build_and_way_out(monkeypatch):
    stand_in_gpu(monkeypatch, "Tesla P100-PCIE-16GB", (6, 0), ["sm_75", "sm_80"])
    with pytest.raises(ConfigError) as refused:
        detect("cuda:0")
    why = (
        "Tesla P100-PCIE-16GB has compute capability 6.0, for which this torch "
        f"({torch.__version__}) was not built: it has sm_75, sm_80"
    )
    assert str(refused.value) == f"device = 'cuda:0': {why}; use device=cpu (in the shell --device cpu)"
    assert detect("auto").passed_over == why


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_exact_products_are_ieee_and_the_setting_comes_back(before):
    matmul = torch.backends.cuda.matmul
    usual = matmul.fp32_precision
    try:
        matmul.fp32_precision = before
        with pytest.raises(KeyError), exact_products():
            assert matmul.fp32_precision == "ieee"
            raise KeyError
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = usual


def test_the_environment_of_a_gpu_tells_what_decides_its_figures(monkeypatch):
    monkeypatch.setattr(hardware, "_driver_version", lambda: "580.159.04")
    facts = environment(L4)
    assert facts["driver"] == "580.159.04" and "cuda" in facts
    assert facts["fp32_products"] == torch.backends.cuda.matmul.fp32_precision
    assert "driver" not in environment(OLD_CPU)


def test_the_driver_is_read_where_linux_tells_it(tmp_path):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@x)\nGCC 13.3.0\n"
    (tmp_path / "version").write_text(line)
    assert hardware._driver_version(str(tmp_path / "version")) == "580.159.04"
    assert hardware._driver_version(str(tmp_path / "missing")) is None


def test_batch_size_by_the_hardware():
    assert (default_batch_size(NEW_CPU), default_batch_size(L4)) == (128, 256)
    assert (default_eval_batch_size("cpu"), default_eval_batch_size("cuda")) == (256, 2048)


def test_environment_has_what_a_reader_needs():
    facts = environment(T4)
    assert facts["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "datasets", "newllm_lib"} < facts["versions"].keys()
    assert (facts["device"], facts["device_name"], facts["capability"]) == ("cuda:0", "T4", (7, 5))
    assert facts["usable_memory_bytes"] == 17_179_869_184


def test_environment_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "system" / "hardware.py"))
    assert environment(T4)["git_commit"] is None


def test_the_commit_is_that_of_a_checkout_which_holds_the_library(monkeypatch, tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    file, other = tmp_path / "system" / "hardware.py", tmp_path / "model.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr(hardware, "__file__", str(file))
    git("init", "-q"), git("commit", "-q", "--allow-empty", "-m", "another project")
    assert hardware._git_commit() is None  # installed inside it, not a part of it
    git("add", "system/hardware.py"), git("commit", "-q", "-m", "the library")
    assert hardware._git_commit() == git("rev-parse", "HEAD")
    other.write_text("a file of another wing")
    assert hardware._git_commit() == git("rev-parse", "HEAD") + "+"
    other.unlink()
    assert hardware._git_commit() == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert hardware._git_commit() == git("rev-parse", "HEAD") + "+"


def test_peak_memory_of_this_process():
    assert 2**24 < peak_memory_bytes(OLD_CPU) < 2**40


# --- out of memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_has_run_out_is_known_in_every_wording(error):
    assert is_out_of_memory(error)


def test_the_allocator_of_this_machine_is_understood():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_only_fp16_scales_its_loss(name):
    precision = hardware.Precision(name, "for the test")
    for scaler, scale in ((precision.scaler("cpu"), 65536.0), (precision.scaler("cpu", init_scale=8.0), 8.0)):
        assert scaler.is_enabled() == (name == "fp16")
        assert float(scaler.scale(torch.tensor(2.0))) == (2.0 * scale if name == "fp16" else 2.0)
