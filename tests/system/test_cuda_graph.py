"""Recorded work of a GPU, with a stand-in for CUDA: what a graph reads must not be let go while it can be replayed."""

import contextlib
import gc
import weakref

import pytest
import torch

from newllm_lib.system.cuda_graph import recorded


class Graph:
    """Counts its replays."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Stream:
    def wait_stream(self, other) -> None:
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    Graph.replays = 0
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class Work:
    def __init__(self):
        self.calls, self.reads = 0, torch.zeros(3)

    def __call__(self) -> None:
        self.calls += 1


def test_work_is_warmed_up_recorded_and_then_only_replayed():
    work = Work()
    replay = recorded(work, "cuda:0", warm_ups=3)
    assert work.calls == 4
    replay(), replay()
    assert (work.calls, Graph.replays) == (4, 2)


def test_what_the_graph_reads_lives_as_long_as_the_replay():
    work = Work()
    memory = weakref.ref(work)
    replay = recorded(work, "cuda:0")
    del work
    gc.collect()
    assert memory() is not None
    del replay
    gc.collect()
    assert memory() is None
