"""A GPU for machines without one: tensors that say they are on cuda:0, computed by the CPU.

    with pretend_cuda() as gpu:
        nl.train(..., device="cuda")
    gpu.launches, gpu.waits

Each operation first checks what a GPU would insist on, that its tensors lie on one device, and is then really computed,
so that code which depends on data runs too. Launches and waits of the host for the device are counted, waits by the
line of the library that waits; while a graph is recorded, a wait is an error.

It does not show what CUDA rounds, how fast it is, what memory it takes, or which operations it lacks.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from newllm_lib.model.recurrence import gradient_sums, self_check
from newllm_lib.studies.bench import training_speed
from newllm_lib.training import batch_graph
from newllm_lib.tuning import products

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")

NO_LAUNCH = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "view",
    "t",
    "_unsafe_view",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsqueeze",
    "squeeze",
    "unbind",
    "as_strided",
    "_reshape_alias",
    "lift_fresh",
    "is_same_size",
    "diagonal",
    "_local_scalar_dense",
}
"""Operations that give no work to the device: they make memory or another view of it, or read a number."""
NEEDS_ANSWER = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
"""Operations whose result, or its size, the host must know."""
ACROSS = {"copy_", "_to_copy", "_foreach_copy_"}
"""Operations on tensors of two devices."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "gather", "scatter", "embedding", "index_select"}


class WrongDeviceError(RuntimeError):
    """What torch says on a GPU: expected all tensors to be on the same device."""


class CaptureError(RuntimeError):
    """What CUDA says: operation not permitted when stream is capturing."""


class OnGPU(torch.Tensor):
    """A tensor on the pretend device. For torch's C++ it is on meta, so that autograd asks for no streams."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device="meta", **layout)

    def __init__(self, values: torch.Tensor):
        self.values_on_cpu = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGPU.current.run(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)  # or load_state_dict would do nothing

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def __repr__(self, **_):
        return f"{self.values_on_cpu!r} on cuda:0"

    def __reduce_ex__(self, protocol):
        return self.values_on_cpu.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        made = OnGPU(self.values_on_cpu.detach().clone())
        memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if getattr(self, "_is_param", False) else made
        return memo[id(self)]


class PretendGPU:
    """What was done on the device."""

    current: "PretendGPU"

    def __init__(self):
        self.capturing = False
        self.reset()

    def reset(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        """By operation and line."""

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    def wait(self, what: str) -> None:
        """Count that the host waits for the device."""
        if self.capturing:
            raise CaptureError(f"{what} at {library_line()}: not permitted when stream is capturing")
        self.waits[f"{what} at {library_line()}"] += 1

    def run(self, func, args, kwargs):
        """Check, count and compute an operation."""
        library, name = func._schema.name.split("::")
        flat, spec = tree_flatten((args, kwargs))
        asked = kwargs.get("device")
        here = any(isinstance(value, OnGPU) for value in flat)
        result_here = here if asked is None else torch.device(asked).type in ("cuda", "meta")
        if here or result_here:
            if library == "mkldnn":
                raise NotImplementedError(f"mkldnn::{name} has no CUDA, at {library_line()}")
            if here and name not in ACROSS:
                check_devices(name, flat)
            self.count(name, flat, result_here)
        bare = [CPU if isinstance(value, torch.device) else on_cpu(value) for value in flat]
        args, kwargs = tree_unflatten(bare, spec)
        kwargs.pop("pin_memory", None)
        if func is torch.ops.aten.mm.dtype:  # 16 bits in, 32 out: CPUs have no such product
            args, func = [value.to(args[2]) for value in args[:2]], torch.ops.aten.mm.default
        known = {id(value): original for value, original in zip(bare, flat, strict=True) if torch.is_tensor(original)}

        def placed(value):
            if not torch.is_tensor(value):
                return value
            return known[id(value)] if id(value) in known else OnGPU(value) if result_here else value

        return tree_map(placed, func(*args, **kwargs))

    def count(self, name: str, flat: list, result_here: bool) -> None:
        """Add an operation to the launches and the waits."""
        tensors = [value for value in flat if torch.is_tensor(value)]
        if name in ACROSS:
            sides = {isinstance(value, OnGPU) for value in tensors} | ({result_here} if name == "_to_copy" else set())
            if len(sides) > 1:
                self.wait(f"copy ({name})")
                return
        by_mask = name in INDEXING and any(value.dtype == torch.bool for value in tensors[1:])
        if name in NEEDS_ANSWER or by_mask:
            self.wait(name)
        if name not in NO_LAUNCH:
            self.kernels[name] += 1


def check_devices(name: str, flat: list) -> None:
    """WrongDeviceError where a tensor of the CPU stands among those of the GPU; a number may, if it is no index."""
    changed = flat[0] if name.endswith("_") else None
    for value in flat:
        if not torch.is_tensor(value) or isinstance(value, OnGPU):
            continue
        if value.ndim or value is changed or name in INDEXING:
            shape = tuple(value.shape)
            raise WrongDeviceError(f"{name}: a CPU tensor {shape} among tensors on cuda:0, at {library_line()}")


def on_cpu(value):
    """The values of what lies on the pretend device; everything else as it is, in containers too."""
    if isinstance(value, OnGPU):
        return value.values_on_cpu
    if isinstance(value, dict):
        return {key: on_cpu(one) for key, one in value.items()}
    return type(value)(on_cpu(one) for one in value) if type(value) in (list, tuple) else value


def library_line() -> str:
    """The innermost line of the library or its tests that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and ("newllm_lib/" in file or "/tests/" in file):
            return f"{file.split('newllm_lib/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Dispatched(TorchDispatchMode):
    """Catches what makes tensors on the device out of nothing, or of CPU tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return PretendGPU.current.run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator that says where it is, and draws as the CPU's does."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: self.place)


class Called(TorchFunctionMode):
    """Does what C++ refuses before anything is dispatched: numbers to tensors, lists as indices, autocast of meta."""

    products = (torch.nn.functional.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.mm,
                torch.bmm, torch.addmm)  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:  # "cuda" alone is the current device
            args = tuple(
                GPU if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value for value in args
            )
            if str(kwargs.get("device")) == "cuda":
                kwargs = kwargs | {"device": GPU}
        check_generator(args, kwargs)
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **kwargs | {"device": "cpu"}).to(GPU)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], OnGPU):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part).to(GPU) if isinstance(part, list) else part for part in index)
            args = (args[0], index if isinstance(args[1], tuple) else index[0], *args[2:])
        if func in self.products and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map(
                lambda value: value.to(dtype) if isinstance(value, OnGPU) and value.is_floating_point() else value,
                (args, kwargs),
            )
        return func(*args, **kwargs)


def check_generator(args: tuple, kwargs: dict) -> None:
    """WrongDeviceError for a generator of another device than the tensor that it fills."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    tensor = args[0] if args and torch.is_tensor(args[0]) else None
    device = torch.device(kwargs.get("device") or "cpu") if tensor is None else tensor.device
    if device.type != generator.device.type:
        raise WrongDeviceError(f"a generator of {generator.device} for a tensor on {device}, at {library_line()}")


def recorded(work, device, warm_ups: int = 1):
    """In place of `system.cuda_graph.recorded`: the work is done again at each replay, and may never wait."""
    gpu = PretendGPU.current
    for _ in range(warm_ups):
        work()

    def replay():
        gpu.capturing = True
        try:
            work()
        finally:
            gpu.capturing = False

    replay()
    return replay


def torch_functions(gpu: PretendGPU, name: str, capability: tuple[int, int], memory: int) -> dict:
    """What `torch.cuda` answers."""
    facts = SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=memory)
    states = [torch.zeros(16, dtype=torch.uint8)]
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device=0: facts,
        "get_device_capability": lambda device=0: capability,
        "get_arch_list": lambda: [],
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=0: (memory * 9 // 10, memory),
        "memory_reserved": lambda device=0: 0,
        "max_memory_reserved": lambda device=0: 1 << 20,
        "max_memory_allocated": lambda device=0: 1 << 20,
        "reset_peak_memory_stats": lambda device=0: None,
        "get_rng_state_all": lambda: [state.clone() for state in states],
        "set_rng_state_all": lambda states: None,
        "is_current_stream_capturing": lambda: False,  # asked by the optimizers
    }


CACHES = (self_check._fault, gradient_sums._widens, products.usual_rate)
"""What the library remembers of a device for as long as the process lives."""


@contextlib.contextmanager
def pretend_cuda(capability: tuple[int, int] = (8, 9), memory: int = 16 << 30, name: str = "Pretend GPU"):
    """Inside, there is one GPU."""
    gpu = PretendGPU.current = PretendGPU()
    grouped = torch._C._group_tensors_by_device_and_dtype

    def group(lists, with_indices=False):
        found = grouped(lists, with_indices)
        return {(GPU if device.type == "meta" else device, dtype): rest for (device, dtype), rest in found.items()}

    with contextlib.ExitStack() as stack:
        for cache in CACHES:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for key, value in torch_functions(gpu, name, capability, memory).items():
            stack.enter_context(mock.patch.object(torch.cuda, key, value))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", group))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        for module in (torch_optimizer, _foreach_utils):
            kinds = [*module._foreach_supported_types, OnGPU]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", kinds))
        for module in (batch_graph, products, training_speed):
            stack.enter_context(mock.patch.object(module, "recorded", recorded))
        with Called(), Dispatched():
            yield gpu
