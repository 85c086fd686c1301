"""Fixtures for every test: caches and plots stay out of the user's places, and small text is easy to write."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny import write_text

from newllm_lib.reporting import curves
from newllm_lib.tuning import execution

REPOSITORY = Path(__file__).resolve().parent.parent

settings.register_profile("newllm", deadline=None)  # a busy machine is no failure
settings.load_profile("newllm")

TRAIN = [
    f"the {who} {does} over the lazy {other}"
    for who in ("fox", "dog", "cat", "crow")
    for does in ("jumps", "runs", "flies")
    for other in ("dog", "fox", "cow")
]
VALID = ["the crow jumps over the quick fox", "a cat runs over the lazy dog", "the dog flies over the cow"]
TEST = ["the cat flies over the lazy fox", "the quick crow runs over the dog"]


def usual_way(work, ways):
    """In place of a measurement: FP32, where it is open, and torch's own threads."""
    return execution.Execution(way=ways[0], rates={ways[0]: 1.0}, rows=work.rows, product_rate=1e9, steady=False)


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory):
    torch.set_num_threads(1)  # tiny products gain nothing from more, and test processes run side by side
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEWLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        patch.setattr(os, "fsync", lambda descriptor: None)  # what a power cut would lose is not what is tested
        patch.setattr(execution, "measure", usual_way)  # a busy machine must not decide what a test computes with
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is most of the time of a tiny run."""
    monkeypatch.setattr(curves, "write_curves", lambda *args: None)
    monkeypatch.setattr(curves, "is_current", lambda *args: True)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder of WikiText-2 that lies beside the checkout on the project's machines."""
    folder = REPOSITORY.parent / "shared" / "data" / "wikitext-2"
    if not (folder / "train.txt").is_file():
        pytest.skip(f"WikiText-2 is not on this machine: {folder} holds no train.txt")
    return folder


@pytest.fixture
def write_corpus(tmp_path):
    """A function that writes a folder of train, valid and test files and returns it."""

    def write(name: str = "corpus", train=TRAIN, valid=VALID, test=TEST) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, texts in (("train", train), ("valid", valid), ("test", test)):
            if texts is not None:
                (folder / f"{split}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of made-up text (62 sequences of `tiny_config`) for tests that only read it."""
    folder = write_text(tmp_path_factory.mktemp("text"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
