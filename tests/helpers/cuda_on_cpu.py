"""The CUDA kernels compiled by the C++ compiler of this machine and run on CPU tensors: a thread for each of theirs.

Slow, and exact about what matters: which thread reads and writes what, and when threads wait for each other.
"""

import ctypes
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

COMPILER = shutil.which("g++")

PRELUDE = r"""
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>
#define __device__ static
#define __forceinline__ inline
#define __global__ static
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict
struct Place { int x; };
static thread_local Place threadIdx, blockIdx, blockDim;
struct Warp { float values[32]; std::barrier<> wait{32}; };
static thread_local Warp* warp_of_thread;
static thread_local std::barrier<>* block_of_thread;
static void __syncthreads() { block_of_thread->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float value, int step) {
  int lane = threadIdx.x & 31;
  warp_of_thread->values[lane] = value;
  warp_of_thread->wait.arrive_and_wait();
  value = warp_of_thread->values[lane ^ step];
  warp_of_thread->wait.arrive_and_wait();
  return value;
}
static float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
"""

LAUNCHER = r"""
template <class... Types, std::size_t... Numbers>
static void call(void (*kernel)(Types...), void** arguments, std::index_sequence<Numbers...>) {
  kernel(*(Types*)arguments[Numbers]...);
}
template <class... Types>
static void launch(void (*kernel)(Types...), int blocks, int threads, void** arguments) {
  for (int block = 0; block < blocks; block++) {
    std::barrier<> wait(threads);
    std::vector<Warp> warps(threads / 32);
    std::vector<std::thread> running;
    for (int thread = 0; thread < threads; thread++)
      running.emplace_back([&, thread] {
        threadIdx = {thread}; blockIdx = {block}; blockDim = {threads};
        warp_of_thread = &warps[thread / 32];
        block_of_thread = &wait;
        call(kernel, arguments, std::index_sequence_for<Types...>{});
      });
    for (auto& thread : running) thread.join();
  }
}
"""

ENTRY = """
extern "C" void launch_NAME(int blocks, int threads, void** arguments) { launch(NAME, blocks, threads, arguments); }
"""


@cache
def library(source: str, folder: Path) -> ctypes.CDLL:
    """All kernels of a source."""
    names = re.findall(r'extern "C" __global__ void (\w+)', source)
    path = folder / f"kernels_{len(list(folder.glob('kernels_*.cpp')))}_{os.getpid()}"
    text = PRELUDE + source.replace('extern "C" __global__', "__global__") + LAUNCHER
    path.with_suffix(".cpp").write_text(text + "".join(ENTRY.replace("NAME", name) for name in names))
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run([COMPILER, *flags, "-o", path.with_suffix(".so"), path.with_suffix(".cpp")], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


def compiled(source: str, name: str, folder: Path):
    """In place of `torch.cuda._compile_kernel`: a callable of grid, block and args, of CPU tensors and integers."""
    function = getattr(library(source, folder), f"launch_{name}")

    def launch(grid, block, args) -> None:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        assert all(value.is_contiguous() for value in tensors)
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int(value)
            for value in args
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        function(grid[0], block[0], pointers)

    return launch
