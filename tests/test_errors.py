"""What a user may catch, and what the shell says of a mistake, a full disk, a file that is a folder, or a bug."""

import errno
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import tiny_config, write_text

import newllm_lib
import newllm_lib as nl
from newllm_lib import errors, runs
from newllm_lib.cli import main
from newllm_lib.config import presets
from newllm_lib.data import corpus
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.files import file_error, file_errors, make_folder, write_text_atomic
from newllm_lib.system.memory import is_out_of_memory
from newllm_lib.training.checkpoint import Checkpoints

BASES = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "RunError": ValueError,
    "RunInUseError": ValueError,
    "TrainingError": RuntimeError,
    "PartialUpdateError": MemoryError,
    "MissingPackageError": ImportError,
    "CheckpointError": ValueError,
    "NewerCheckpointError": ValueError,
    "NoModelError": ValueError,
    "BundleError": ValueError,
    "ChangedError": ValueError,
    "FileError": OSError,
    "FileMissingError": FileNotFoundError,
    "FileTakenError": FileExistsError,
    "FilePermissionError": PermissionError,
    "NotAFileError": IsADirectoryError,
    "NotAFolderError": NotADirectoryError,
    "NetworkError": ConnectionError,
    "DownloadError": ValueError,
}


def test_every_exception_has_our_base_and_the_one_of_before():
    assert {*BASES, "NewLLMError"} == set(errors.__all__)
    for name, base in BASES.items():
        assert issubclass(getattr(errors, name), errors.NewLLMError), name
        assert issubclass(getattr(errors, name), base), name
        assert getattr(nl, name) is getattr(errors, name)
    assert issubclass(nl.NewerCheckpointError, nl.CheckpointError)
    assert issubclass(nl.NoModelError, nl.CheckpointError)


def test_no_other_module_has_an_exception_of_its_own_for_users():
    others = set()
    for found in pkgutil.walk_packages(newllm_lib.__path__, "newllm_lib."):
        if found.name == "newllm_lib.__main__":
            continue
        module = importlib.import_module(found.name)
        classes = [value for _, value in inspect.getmembers(module, inspect.isclass)]
        own = {value for value in classes if issubclass(value, Exception) and value.__module__ == module.__name__}
        others |= {f"{value.__module__}.{value.__name__}" for value in own if not value.__name__.startswith("_")}
    assert others == {f"newllm_lib.errors.{name}" for name in errors.__all__}


def test_exceptions_of_checkpoints_are_found_where_they_were():
    for name in ("CheckpointError", "NewerCheckpointError", "NoModelError"):
        assert getattr(nl.checkpoint, name) is getattr(nl, name)


# --- what the system says of a file -----------------------------------------------------------------------------

SYSTEM = {
    errno.ENOENT: (nl.FileMissingError, "No such file or directory"),
    errno.EEXIST: (nl.FileTakenError, "File exists (another name is needed, or move that away)"),
    errno.EACCES: (nl.FilePermissionError, "Permission denied (change the permissions, or choose another folder)"),
    errno.EISDIR: (nl.NotAFileError, "Is a directory (this is a folder, and a file is needed)"),
    errno.ENOTDIR: (nl.NotAFolderError, "Not a directory (this is a file, or lies below one, and a folder is needed)"),
    errno.ENOSPC: (
        nl.FileError, "No space left on device (the disk is full: free some space, or choose another folder)"
    ),
    errno.EROFS: (nl.FileError, "Read-only file system (nothing can be written there: choose another folder)"),
    errno.EMFILE: (nl.FileError, "Too many open files"),
}  # fmt: skip


@pytest.mark.parametrize("number", SYSTEM)
def test_an_error_of_the_system_keeps_its_facts_and_names_the_path(number):
    kind, words = SYSTEM[number]
    cause = OSError(number, os.strerror(number))
    with pytest.raises(nl.NewLLMError) as caught, file_errors("a/b", "cannot read a/b"):
        raise cause
    error = caught.value
    assert type(error) is kind
    assert (error.errno, error.strerror, error.filename) == (number, os.strerror(number), "a/b")
    assert str(error) == f"cannot read a/b: {words}"
    assert error.__cause__ is cause
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.errno, again.filename) == (kind, str(error), number, "a/b")


def test_without_a_path_an_error_that_names_a_file_is_told_and_any_other_passes(tmp_path):
    with pytest.raises(nl.FileMissingError, match=f"^{tmp_path}/none: No such file or directory$"), file_errors():
        (tmp_path / "none").read_bytes()
    bug = OSError("planted")
    with pytest.raises(OSError) as caught, file_errors():
        raise bug
    assert caught.value is bug


def test_one_of_ours_is_not_wrapped_again():
    inner = nl.FileError("inner")
    with pytest.raises(nl.FileError) as caught, file_errors("outer"):
        raise inner
    assert caught.value is inner


def test_memory_that_runs_out_in_a_file_is_still_seen_as_that():
    assert is_out_of_memory(file_error(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "x"))
    assert is_out_of_memory(nl.PartialUpdateError("half changed"))
    assert not is_out_of_memory(file_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "x"))


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=f"cannot make the folder {tmp_path}/file: File exists"):
        make_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=f"cannot make the folder {tmp_path}/file/below: Not a directory"):
        make_folder(tmp_path / "file" / "below")


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a bundle, its text, and an old file: made once, copied by each test."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        text = write_text(place / "text")
        run = runs.train(tiny_config(text, name="small", max_steps=3, epochs=None), progress=Progress())
        nl.bundle(run, checkpoint=True)
    (place / "file").write_text("no checkpoint\n")
    (place / "empty").mkdir()
    return place


SMALL = ["--device", "cpu", "--batch-size", "8", "--max-steps", "3"]
SMALL += ["--embed-dim", "8", "--hidden-dim", "12", "--num-layers", "1", "--context-dim", "6", "--vocab-size", "40"]
SMALL += ["--sequence-length", "12", "--stride", "6"]
TINY = [*SMALL, "--data", "text", "--precision", "fp32"]
STUDY = [*SMALL, "--data", "text", "--formats", "fp32,bf16"]
GRID = [*TINY, "--batch-sizes", "8"]


@pytest.fixture
def newllm(made, tmp_path, monkeypatch):
    """The command in a folder with `text`, the run `results/small`, its bundle, a `file` and an `empty` folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


def assert_one_line(result, *parts):
    """A message of one line, and no traceback."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    said = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, result.output
    for part in parts:
        assert str(part) in said[0], said[0]


RUN = "results/small"
FOLDER_FOR_FILE = {
    "bundle --out": (["bundle", RUN, "--out", "empty"], "empty"),
    "open": (["open", "empty"], "empty"),
    "import": (["import", "empty", "--data", "text"], "empty"),
    "continue": (["continue", "empty"], "empty"),
    "generate --prompts": (["generate", RUN, "--prompts", "empty"], "empty"),
    "train --data": (["train", "quickstart", *SMALL, "--data", "empty"], "empty"),
    "evaluate --data": (["evaluate", RUN, "--data", "empty"], "empty"),
    "compare --shared-words": (["compare", RUN, "empty", "--shared-words"], "empty"),
}
FILE_FOR_FOLDER = {
    "train --results-dir": (["train", "quickstart", *TINY, "--results-dir", "file"], "file"),
    "train --mirror-dir": (["train", "quickstart", *TINY, "--mirror-dir", "file"], "file"),
    "train --results-dir below": (["train", "quickstart", *TINY, "--results-dir", "file/below"], "file/below"),
    "continue --results-dir": (["continue", f"{RUN}.zip", "--results-dir", "file"], "file"),
    "evaluate": (["evaluate", "file"], "file"),
    "generate": (["generate", "file"], "file"),
    "compare": (["compare", "file"], "file"),
    "compare --out": (["compare", RUN, "--out", "file"], "file"),
    "export": (["export", RUN, "file"], "file"),
    "export of": (["export", "file", "out"], "file"),
    "bundle": (["bundle", "file"], "file"),
    "bundle --out below": (["bundle", RUN, "--out", "file/run.zip"], "file"),
    "open": (["open", "file"], "file"),
    "open --results-dir": (["open", f"{RUN}.zip", "--results-dir", "file"], "file"),
    "import": (["import", "file", "--data", "text"], "file"),
    "lr-find --out": (["lr-find", "quickstart", *TINY, "--steps", "20", "--out", "file"], "file"),
    "lr-find --from": (["lr-find", "quickstart", *TINY, "--from", "file"], "file"),
    "precisions": (["precisions", "quickstart", *STUDY, "--results-dir", "file"], "file"),
    "lr-scaling": (["lr-scaling", "quickstart", *GRID, "--results-dir", "file"], "file"),
    "bench --out": (["bench", "--out", "file"], "file"),
}
TOO_LONG = "a" * 300
LONG_NAMES = {
    "train --data": ["train", "quickstart", *SMALL, "--data", TOO_LONG],
    "train --results-dir": ["train", "quickstart", *TINY, "--results-dir", TOO_LONG],
    "train --mirror-dir": ["train", "quickstart", *TINY, "--mirror-dir", TOO_LONG],
    "train --name": ["train", "quickstart", *TINY, "--name", TOO_LONG],
    "train --plan": ["train", "quickstart", *TINY, "--plan", "--name", TOO_LONG],
    "probe --data": ["probe", "quickstart", *SMALL, "--data", TOO_LONG],
    "continue": ["continue", TOO_LONG],
    "continue --results-dir": ["continue", "--results-dir", TOO_LONG],
    "evaluate": ["evaluate", TOO_LONG],
    "generate": ["generate", TOO_LONG],
    "compare": ["compare", TOO_LONG],
    "compare --out": ["compare", RUN, "--out", TOO_LONG],
    "compare --shared-words": ["compare", TOO_LONG, RUN, "--shared-words"],
    "export": ["export", RUN, TOO_LONG],
    "bundle": ["bundle", TOO_LONG],
    "bundle --out": ["bundle", RUN, "--out", TOO_LONG],
    "open": ["open", TOO_LONG],
    "open --name": ["open", f"{RUN}.zip", "--name", TOO_LONG],
    "import": ["import", TOO_LONG, "--data", "text"],
    "lr-find --out": ["lr-find", "quickstart", *TINY, "--out", TOO_LONG],
    "lr-find --from": ["lr-find", "quickstart", *TINY, "--from", TOO_LONG],
    "precisions": ["precisions", "quickstart", *STUDY, "--name", TOO_LONG],
    "lr-scaling": ["lr-scaling", "quickstart", *GRID, "--name", TOO_LONG],
    "bench": ["bench", "--out", TOO_LONG],
}


@pytest.mark.parametrize("case", FOLDER_FOR_FILE)
def test_a_folder_where_a_file_is_needed_is_told_in_one_line(newllm, case):
    arguments, named = FOLDER_FOR_FILE[case]
    assert_one_line(newllm(*arguments), named)
    assert not any(Path("empty").iterdir())


@pytest.mark.parametrize("case", FILE_FOR_FOLDER)
def test_a_file_where_a_folder_is_needed_is_told_in_one_line(newllm, case):
    arguments, named = FILE_FOR_FOLDER[case]
    assert_one_line(newllm(*arguments), named)
    assert Path("file").read_text() == "no checkpoint\n"


@pytest.mark.parametrize("case", LONG_NAMES)
def test_a_name_that_is_too_long_is_told_in_one_line(newllm, case):
    assert_one_line(newllm(*LONG_NAMES[case]), TOO_LONG)


# --- a full disk, and no permission -----------------------------------------------------------------------------


def full_disk_at(path):
    """What `write_atomic` will write before it is renamed to `path` goes to a device that is always full."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    return path


WRITERS = {
    "results/full/run.json": ["train", "quickstart", *TINY, "--name", "full"],
    "results/full/checkpoints/best_full.pt": ["train", "quickstart", *TINY, "--name", "full"],
    "results/small/history.csv": ["continue", RUN, "--max-steps", "4"],
    "out/model.safetensors": ["export", RUN, "out"],
    "out.zip": ["bundle", RUN, "--out", "out.zip"],
    "out/comparison.png": ["compare", RUN, "--out", "out"],
    "out/lr_find.csv": ["lr-find", "quickstart", *TINY, "--steps", "20", "--out", "out"],
    "results/study/settings.json": ["precisions", "quickstart", *STUDY, "--name", "study"],
    "results/grid/settings.json": ["lr-scaling", "quickstart", *GRID, "--name", "grid"],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("path", WRITERS)
def test_a_full_disk_is_told_with_the_path_and_nothing_half_written_is_left(newllm, path):
    if path.startswith("out/model"):  # one that is there, to be replaced: an export takes no other folder
        assert newllm("export", RUN, "out", "--half").exit_code == 0
    before = Path(path).read_bytes() if Path(path).exists() else None
    full_disk_at(path)
    assert_one_line(newllm(*WRITERS[path]), f"cannot write {path}: No space left on device", "the disk is full: free")
    assert (Path(path).read_bytes() if Path(path).exists() else None) == before
    assert [found for found in Path().rglob("*.tmp") if found.name.startswith(f".{Path(path).name}")] == []


@pytest.mark.parametrize("arguments", [["open", f"{RUN}.zip", "--name", "other"], ["continue", f"{RUN}.zip"]])
def test_a_disk_that_ends_while_a_bundle_is_opened_leaves_nothing(newllm, arguments):
    """The system itself refuses files of more than 100 bytes."""
    if arguments[0] == "continue":
        shutil.rmtree(RUN)
    before = sorted(Path("results").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        result = newllm(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(result, "cannot write results/", "File too large")
    assert sorted(Path("results").iterdir()) == before


@pytest.fixture
def no_permission(newllm):
    """Run as somebody who may do nothing in this folder but read it, where the tests run as root."""
    assert newllm("compare", RUN).exit_code == 0  # what is imported late may lie where only root can read
    assert newllm("lr-find", "quickstart", *TINY, "--steps", "20", "--out", "first").exit_code == 0
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        shutil.copytree(".", place, dirs_exist_ok=True)
        os.chmod(f"{place}/{RUN}/run.json", 0)
        os.chmod(f"{place}/text/valid.txt", 0)
        os.mkdir(f"{place}/closed", 0o700 if os.geteuid() == 0 else 0)
        os.chmod(place, 0o555)
        before, root = os.getcwd(), os.geteuid() == 0
        os.chdir(place)
        if root:
            os.seteuid(65534)
        try:
            yield newllm
        finally:
            if root:
                os.seteuid(0)
            os.chdir(before)
            os.chmod(place, 0o755)
            os.chmod(f"{place}/closed", 0o700)


DENIED = {
    f"{RUN}/run.json": [["evaluate", RUN], ["compare", RUN], ["bundle", RUN], ["continue", RUN]],
    "data text/valid.txt": [["train", "quickstart", *TINY], ["evaluate", f"{RUN}/model", "--data", "text"]],
    "closed": [["evaluate", "closed/run"], ["open", "closed/run.zip"], ["train", "quickstart", "--data", "closed"]],
    "out": [["export", f"{RUN}/model", "out"]],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "newllm_lib", "presets"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr.startswith("Error: cannot write to standard output: No space left on device\n")
    assert "Traceback" not in ended.stderr


def test_what_is_not_permitted_is_told_with_the_path(no_permission):
    """Real refusals of the system; as root the effective user is changed, since root may do everything."""
    for named, commands in DENIED.items():
        for arguments in commands:
            assert_one_line(no_permission(*arguments), named, "Permission denied", "change the permissions")


# --- memory, and bugs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out"),
        (MemoryError("too much"), "too much"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nC++ frames"), "memory ran out: Default"),
    ],
)
def test_exhausted_memory_is_one_line(newllm, monkeypatch, error, said):
    def exhausted(*arguments, **options):
        raise error

    monkeypatch.setattr(runs, "evaluate", exhausted)
    assert_one_line(newllm("evaluate", RUN), said)


BUGS = [
    RuntimeError("planted"),
    ValueError("planted"),
    OSError("planted"),
    KeyError("planted"),
    OSError(errno.ENOSPC, "planted"),
]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_is_not_taken_for_a_mistake_of_the_user(newllm, monkeypatch, bug):
    def broken(*arguments, **options):
        raise bug

    monkeypatch.setattr(runs, "evaluate", broken)
    result = newllm("evaluate", RUN)
    assert (result.exception, result.exit_code) == (bug, 1)
    monkeypatch.setattr(presets, "get", broken)
    assert newllm("train", "quickstart").exception is bug


def test_a_bug_shows_its_traceback_and_ends_with_status_1():
    script = """
from newllm_lib.config import presets
from newllm_lib.cli import main
class Broken(dict):
    def items(self):
        raise ValueError("planted")
presets.PRESETS = Broken()
main(["presets"])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.endswith("ValueError: planted\n")


def test_the_traceback_behind_a_message_can_be_asked_for(newllm, monkeypatch):
    monkeypatch.setenv("NEWLLM_DEBUG", "1")
    assert isinstance(newllm("evaluate", "empty").exception, nl.FileMissingError)


# --- damaged files ----------------------------------------------------------------------------------------------

BEST = f"{RUN}/checkpoints/best_small.pt"
LOADERS = [["generate", RUN, "--tokens", "2"], ["bundle", RUN], ["open", f"{RUN}.zip", "--name", "small"]]
READERS = {
    "run.json": [["compare", RUN], ["continue"], *LOADERS, ["continue", RUN, "--max-steps", "4", "--plan"]],
    "history.csv": [["compare", RUN], ["open", f"{RUN}.zip", "--name", "small"]],
    "model/config.json": LOADERS,
    "model/tokenizer.json": LOADERS,
    "model/data.json": [["generate", f"{RUN}/model", "--tokens", "2"], ["export", f"{RUN}/model", "out"]],
    "model/model.safetensors": LOADERS,
    "checkpoints/best_small.pt": [["generate", BEST, "--tokens", "2"]],
    "checkpoints/best_small.pt.json": [["generate", BEST, "--tokens", "2"]],
}
"""The commands that read each file of a run."""
GARBAGE = {
    "empty": b"", "a table": b"a,b\n1,x\n", "not UTF-8": b"\xff\xfe\xfa", "not JSON": b"{", "a list": b"[]",
    "a number": b"7", "NUL": bytes(99), "deep": b"[" * 100_000, "a zip's start": b"PK\x03\x04" + bytes(60),
    "an object": b'{"kind": 3, "words": [3]}',
    "a sidecar": b'{"contents": [{"sha256": 1, "step": "x", "bytes": 2}, 3]}',
}  # fmt: skip


def assert_no_traceback(result, arguments):
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, repr(result.exception))
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_no_bug(newllm, made, no_pictures, name):
    for garbage in GARBAGE.values():
        for arguments in READERS[name]:
            shutil.rmtree(RUN)
            shutil.copytree(made / RUN, RUN)
            Path(RUN, name).write_bytes(garbage)
            assert_no_traceback(newllm(*arguments), arguments)


@pytest.mark.parametrize("name", ["empty", "a table"])
def test_a_finished_run_with_a_damaged_history_names_it(newllm, name):
    Path(RUN, "history.csv").write_bytes(GARBAGE[name])
    assert_one_line(newllm("continue"), f"{RUN}/history.csv: damaged")


@pytest.mark.parametrize("name", ["", ".json"])
def test_a_damaged_checkpoint_stops_no_run_that_has_another(newllm, made, name):
    said = []
    for garbage in GARBAGE.values():
        shutil.rmtree(RUN)
        shutil.copytree(made / RUN, RUN)
        Path(BEST + name).write_bytes(garbage)
        files = Checkpoints(Path(RUN, "checkpoints"), "small")
        assert files.newest_valid(said.append)[1]["state"]["step"] == 3
        try:
            nl.adopt(BEST, "elsewhere")
        except nl.NewLLMError as error:
            said.append(str(error))
    assert len(said) >= len(GARBAGE) - 1
    assert all(line.startswith(BEST) for line in said)


@pytest.mark.slow
def test_a_record_with_a_value_of_another_kind_is_no_bug(newllm, made):
    record = json.loads(Path(RUN, "run.json").read_text())
    for name in record:
        for value in (None, 7, "text", [], {}):
            write_text_atomic(Path(RUN, "run.json"), json.dumps(record | {name: value}))
            for arguments in (["generate", RUN, "--tokens", "2"], ["compare", RUN], ["bundle", RUN, "--out", "b.zip"]):
                assert_no_traceback(newllm(*arguments), (name, value, arguments))


def test_a_damaged_bundle_is_no_bug(newllm):
    whole = Path(f"{RUN}.zip").read_bytes()
    generator = random.Random(0)
    for _ in range(25):
        damaged = bytearray(whole[: generator.randrange(len(whole) // 2, len(whole) + 1)])
        for _ in range(3):
            place = generator.randrange(max(0, len(damaged) - 1500), len(damaged))  # the directory is at the end
            damaged[place] = generator.randrange(256)
        Path("damaged.zip").write_bytes(damaged)
        for arguments in (["open", "damaged.zip", "--name", "new"], ["continue", "damaged.zip", "--results-dir", "r"]):
            assert_no_traceback(newllm(*arguments), arguments)
            shutil.rmtree("results/new", ignore_errors=True)


def test_a_tokenizer_that_is_no_sentencepiece_model_is_named(newllm):
    for model in ("", "AAAA", "not base64!", 3):
        Path(RUN, "model", "tokenizer.json").write_text(json.dumps({"kind": "sentencepiece", "model": model}))
        assert_one_line(newllm("generate", RUN), f"{RUN}/model: not a model folder that can be read")


# --- values that cannot be, and the network ---------------------------------------------------------------------

VALUES = {
    "--max-gib nan": ["open", f"{RUN}.zip", "--max-gib", "nan", "--name", "new"],
    "--max-gib inf": ["open", f"{RUN}.zip", "--max-gib", "inf", "--name", "new"],
    "--high inf": ["lr-find", "quickstart", *TINY, "--high", "inf"],
    "--low nan": ["lr-find", "quickstart", *TINY, "--low", "nan"],
    "--temperature": ["generate", RUN, "--temperature", "nan"],
    "--top-p": ["generate", RUN, "--top-p", "2"],
    "--top-k": ["generate", RUN, "--top-k", "-1"],
    "--tokens": ["generate", RUN, "--tokens", "0"],
    "--stop": ["generate", RUN, "--stop", ""],
    "--split": ["evaluate", RUN, "--split", "other"],
    "--engine": ["train", "quickstart", *TINY, "--engine", "steam"],
    "--device": ["train", "quickstart", *TINY, "--device", "abacus"],
    "--batch-size": ["train", "quickstart", *TINY, "--batch-size", "100000"],
    "--vocab-size": ["train", "quickstart", *TINY, "--vocab-size", "40", "--tokenizer", "sentencepiece"],
    "--sha256": ["continue", f"{RUN}.zip", "--sha256", "12"],
    "another sha256": ["continue", f"{RUN}.zip", "--sha256", "0" * 64],
    "--epochs": ["continue", RUN, "--max-steps", "1"],
    "--part": ["bench", "--part", "engine"],
    "--formats": ["precisions", "quickstart", *STUDY, "--formats", "fp32"],
    "--rules": ["lr-scaling", "quickstart", *GRID, "--rules", "cubic"],
    "--shared-words": ["compare", RUN, f"{RUN}/none", "--shared-words"],
    "--memory-share": ["probe", "quickstart", *TINY, "--memory-share", "nan"],
    "--prompts": ["generate", RUN, "--prompts", "latin1"],
    "text not UTF-8": ["train", "quickstart", *SMALL, "--data", "latin1"],
    "text of one line": ["train", "quickstart", *SMALL, "--data", "file"],
    "text of blanks": ["train", "quickstart", *SMALL, "--data", "blanks"],
    "a stream too short": ["train", "quickstart", *TINY, "--layout", "stream", "--sequence-length", "4000"],
    "min_words": ["train", "quickstart", *TINY, "--min-words", "4000"],
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_cannot_be_is_one_line(newllm, case):
    Path("latin1").write_bytes("n\u00e9\n".encode("latin1") * 20)
    Path("blanks").write_bytes(b" \n\n")
    assert_one_line(newllm(*VALUES[case]))


@pytest.mark.slow
def test_bytes_that_are_no_character_are_no_bug(newllm):
    assert_one_line(newllm("generate", RUN, "--prompt", "w1 \udcff"), r"'w1 \udcff': not UTF-8")
    shutil.copyfile("text/train.txt", "caf\udce9.txt")
    assert_one_line(newllm("train", "quickstart", *TINY, "--name", "\udcff"), r"name = '\udcff': must be a plain")
    trained = newllm("train", "quickstart", *SMALL, "--data", "caf\udce9.txt", "--name", "new")
    assert trained.exit_code == 0, trained.output
    assert r"caf<span>&#92;</span>udce9" in Path("results/new/report.md").read_text()
    plan = newllm("train", "quickstart", *SMALL, "--data", "caf\udce9.txt", "--name", "new", "--plan")
    assert r"caf\udce9" in plan.stdout
    spoken = CliRunner().invoke(main, ["generate", RUN, "--interactive"], input=b"\xff\n")
    assert_one_line(spoken, "the input is not UTF-8")


def test_a_full_disk_under_the_cache_of_the_hub_is_no_lack_of_network(monkeypatch):
    import datasets

    def load(*arguments, token):
        assert token is False  # nothing is asked for a public text
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/wikitext")

    monkeypatch.setattr(corpus, "_why_no_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(nl.FileError, match="data wikitext-2: No space left on device") as caught:
        corpus._load_hub_dataset("wikitext-2-v1", "wikitext-2")
    assert caught.value.filename == "/cache/wikitext"


def test_a_cache_that_cannot_be_written_stops_nothing(newllm, monkeypatch):
    monkeypatch.setenv("NEWLLM_CACHE", "file/below")
    assert newllm("evaluate", RUN).exit_code == 0
    assert newllm("train", "quickstart", *TINY, "--name", "new").exit_code == 0
