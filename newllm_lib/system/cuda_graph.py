"""Work of a GPU that is recorded once and replayed with a single launch."""

from __future__ import annotations

from collections.abc import Callable

import torch


def recorded(work: Callable[[], object], device: torch.device | str, warm_ups: int = 1) -> Callable[[], None]:
    """Record what `work` launches on a GPU; returns what replays it, on the same memory each time.

    work: must not wait for the device, and read only memory that it keeps; it is held as long as the replay is.
    warm_ups: calls before the recording, in which libraries choose their kernels and take their memory. Errors of
    CUDA where something in it cannot be recorded.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()

    def replay(_held: Callable[[], object] = work) -> None:  # a graph reads the memory of its inputs without holding it
        graph.replay()

    return replay
