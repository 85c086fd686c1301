"""The series' own files: the same logits, a run's folder, and nothing in them is ever run."""

import collections
import csv
import enum
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from published_format import (
    HISTORY,
    SETTINGS,
    SHAPE,
    data_class,
    installed,
    old_logits,
    old_payload,
    old_weights,
    plain_class,
    write_old,
)
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib.cli import Messages, main
from newllm_lib.cli.legacy import import_
from newllm_lib.config import ModelConfig, published
from newllm_lib.errors import CheckpointError
from newllm_lib.reporting import report
from newllm_lib.reporting.record import HISTORY_COLUMNS, read_record
from newllm_lib.runs.run import load_model
from newllm_lib.sharing.legacy import import_checkpoint, import_run, read_old
from newllm_lib.studies.bench.baselines import PublishedLoop
from newllm_lib.training.checkpoint import save_checkpoint

CONFIG_CLASS = "src.utils.config.NewLLMConfig"
TOKENS = [2, 5, 33, 9, 0, 30, 17, 1, 1, 12, 3, 8]


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def old(tmp_path):
    return write_old(tmp_path / "best_l4.pt")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the weights ------------------------------------------------------------------------------------------------


def test_the_helper_writes_the_names_and_formulas_of_the_published_loop():
    loop = PublishedLoop(ModelConfig(**SHAPE, dropout=0.0))
    weights = old_weights()
    loop.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})  # strict: every name
    expected, _ = old_logits(weights, TOKENS)
    np.testing.assert_allclose(loop(torch.tensor([TOKENS]))[0].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_logits_are_those_of_the_published_formulas(tmp_path, layers, legacy):
    weights = old_weights(num_layers=layers)
    model = import_checkpoint(write_old(tmp_path / "old.pt", weights, legacy=legacy))
    assert not model.training
    expected, last = old_logits(weights, TOKENS)
    with torch.no_grad():
        first, context = model(torch.tensor([TOKENS[:7]]))
        second, context = model(torch.tensor([TOKENS[7:]]), context)
    np.testing.assert_allclose(torch.cat([first, second], 1)[0].numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(context[0].numpy(), last, atol=1e-5)
    assert np.abs(expected).max() > 1  # so that 1e-5 is a claim
    without, _ = old_logits(weights, TOKENS[7:])
    assert np.abs(without - expected[7:]).max() > 0.1  # the carried context matters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_become_float32(tmp_path, dtype):
    stored = {name: torch.from_numpy(value).to(dtype) for name, value in old_weights().items()}
    model = import_checkpoint(write_old(tmp_path / "old.pt", stored))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected, _ = old_logits({name: value.to(torch.float64).numpy() for name, value in stored.items()}, TOKENS)
    np.testing.assert_allclose(model(torch.tensor([TOKENS]))[0][0].detach().numpy(), expected, atol=1e-5)


def test_stored_parameters_are_read_too(tmp_path):
    weights = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in old_weights().items()}
    torch.save({"model_state_dict": collections.OrderedDict(weights)}, tmp_path / "old.pt")
    model = import_checkpoint(tmp_path / "old.pt")
    assert torch.equal(model.output.bias, weights["token_output.bias"])


# --- configurations ---------------------------------------------------------------------------------------------


class WithClassValues:
    batch_size = 2048


def settings_of(tmp_path, config):
    torch.save(old_payload(config=config), tmp_path / "old.pt")
    return tmp_path / "old.pt"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["plain", "dataclass", "dataclass with slots"])
def test_attributes_of_an_object_are_recognised(tmp_path, kind, legacy):
    cls = plain_class() if kind == "plain" else data_class(SETTINGS, slots=kind != "dataclass")
    with installed(CONFIG_CLASS, cls):
        torch.save(old_payload(config=cls(**SETTINGS)), tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
    assert "src" not in sys.modules
    old = read_old(tmp_path / "old.pt")
    assert old.config_class == CONFIG_CLASS
    recipe = old.recipe()
    assert recipe.recognised == {
        "batch_size": 2048, "lr": 8e-4, "epochs": 50, "dropout": 0.2, "sequence_length": 12, "patience": 30,
    }  # fmt: skip
    assert recipe.rejected == []
    assert recipe.others == {"gradient_clip": "1", "device": "'cuda'", "use_amp": "True"}
    assert old.model().config.dropout == 0.2


def test_a_dictionary_none_and_class_values(tmp_path, text):
    torch.save(old_payload(config=dict(SETTINGS)), tmp_path / "dictionary.pt")
    assert read_old(tmp_path / "dictionary.pt").recipe().recognised["batch_size"] == 2048
    torch.save(old_payload(config=None), tmp_path / "none.pt")
    with installed(CONFIG_CLASS, WithClassValues):
        torch.save(old_payload(config=WithClassValues()), tmp_path / "class.pt")
    for name, words in (
        ("dictionary", "a dict"),
        ("none", "none in the file"),
        ("class", f"an object of {CONFIG_CLASS}, with no stored value (those of a class itself are not in a file)"),
    ):
        folder = import_run(tmp_path / f"{name}.pt", data=str(text), results_dir=tmp_path / "results")
        plan = dict(read_record(folder)["plan"])
        assert plan["config"] == words
        assert (plan["recognised"] == "nothing") == (name != "dictionary")


def test_values_that_are_not_valid_or_not_the_tensors_are_told(tmp_path):
    settings = {
        "batch_size": -3, "learning_rate": "fast", "lr": 5e-4, "num_epochs": True, "num_layers": 6, "hidden_dim": 7,
        "seed": 10**400, "dropout": [0.1], "note": "\x1b[2J", "\x1b[31m": 1,
    }  # fmt: skip
    recipe = read_old(write_old(tmp_path / "old.pt", settings=settings)).recipe()
    assert recipe.recognised == {}
    assert recipe.rejected == [
        "num_layers = 6: the tensors say 3",
        "batch_size = -3: must be a whole number from 1 to 1,000,000, or none",
        "learning_rate = 'fast': must be a number, above 0 and at most 100, or none",
        "num_epochs = True: must be a whole number from 1 to 1,000,000, or none",
        "dropout = (list): must be a number, at least 0 and below 1",
        f"seed = {str(10**400)[:60]}: must be a whole number from 0 to {2**63 - 1:,}",
    ]
    assert recipe.others == {"lr": "0.0005", "note": r"'\x1b[2J'"}  # nothing that a terminal would carry out


# --- safety -----------------------------------------------------------------------------------------------------


class Canary:
    def __reduce__(self):
        return os.system, ("touch marker",)


class Evaluated:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('marker').touch()",)


def touch(name):
    Path(name).touch()


class CallsInstalled:
    def __reduce__(self):
        return touch, ("marker",)


class WithState:
    def __init__(self):
        self.batch_size = 7

    def __setstate__(self, state):
        touch("marker")


class Color(enum.Enum):
    RED = 1


MALICIOUS = {
    "a configuration": (lambda: {"config": Canary()}, f"{os.system.__module__}.system"),
    "an optimizer": (lambda: {"optimizer_state_dict": {"state": [Canary()]}}, f"{os.system.__module__}.system"),
    "a key nobody reads": (lambda: {"extra": ({"deep": [(Canary(),)]},)}, f"{os.system.__module__}.system"),
    "eval": (lambda: {"config": {"batch_size": Evaluated()}}, "__builtin__.eval"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", MALICIOUS)
def test_code_in_a_file_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, text, case, legacy):
    monkeypatch.chdir(tmp_path)
    make, name = MALICIOUS[case]
    torch.save(old_payload(**make()), "evil.pt", _use_new_zipfile_serialization=not legacy)
    for read in (import_checkpoint, lambda path: import_run(path, data=str(text))):
        with pytest.raises(CheckpointError, match=f"^evil.pt: refused: it names '{name}'; only tensors"):
            read("evil.pt")
    assert contents(tmp_path) == ["evil.pt", "text"]
    torch.load("evil.pt", weights_only=False)  # the control: it would have run
    assert Path("marker").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol, words in ((2, "it names 'posix.system'"), (4, "a class or function by STACK_GLOBAL")):
        data = pickle.dumps({"model_state_dict": Canary()}, protocol)
        Path("evil.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match=words.replace("posix", os.system.__module__)):
            import_checkpoint("evil.pt")
        assert contents(tmp_path) == ["evil.pt"]
        pickle.loads(data)
        assert Path("marker").exists()
        Path("marker").unlink()


def test_a_zip_file_behind_a_pickle_hides_nothing(tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Canary(), 2)
    Path("evil.pt").write_bytes(evil + old.read_bytes())
    with pytest.raises(CheckpointError, match=f"it names '{os.system.__module__}.system'"):
        import_checkpoint("evil.pt")
    assert not Path("marker").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_function_of_src_is_never_called(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    with installed("src.utils.config.touch", touch):
        torch.save(old_payload(config=CallsInstalled()), "evil.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            CheckpointError, match=r"refused: it calls 'src\.utils\.config\.touch' with arguments; only stored attrib"
        ):
            import_checkpoint("evil.pt")  # the function is there, and still not called
        assert not Path("marker").exists()
        torch.load("evil.pt", weights_only=False)
        assert Path("marker").exists()


def test_an_installed_class_that_is_declared_safe_is_still_not_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = [(type("Safe", (WithState,), {}), CONFIG_CLASS) for _ in range(30)]  # torch takes any of those of a name
    with installed(CONFIG_CLASS, WithState), torch.serialization.safe_globals([WithState, *many]):
        torch.save(old_payload(config=WithState()), "old.pt")
        before = set(torch.serialization.get_safe_globals())
        assert read_old(Path("old.pt")).recipe().recognised == {"batch_size": 7}
        assert not Path("marker").exists()
        assert set(torch.serialization.get_safe_globals()) == before
        torch.load("old.pt", weights_only=True)  # the control: torch itself would have used it
        assert Path("marker").exists()


class OtherConfig:
    pass


def test_one_class_of_src_alone_is_read(tmp_path):
    with installed("src.a.First", plain_class()) as first, installed("src.b.Second", OtherConfig):
        torch.save(old_payload(config=first(optimizer=OtherConfig())), tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"refused: it names two classes, 'src\.a\.First' and 'src\.b\.Second'"):
        import_checkpoint(tmp_path / "two.pt")
    with installed("src.a.Color", Color):
        torch.save(old_payload(config={"color": Color.RED}), tmp_path / "enum.pt")
    with pytest.raises(CheckpointError, match=r"refused: it calls 'src\.a\.Color' with arguments"):
        import_checkpoint(tmp_path / "enum.pt")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(3.5), r"numpy\._core\.multiarray\.scalar"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (torch.device("cpu"), r"torch\.device"),
        (collections.Counter("a"), r"collections\.Counter"),
        (Path("a"), r"pathlib\.(PosixPath|_local\.PosixPath)"),
        (WithClassValues(), r"tests\.sharing\.legacy\.test_import_run\.WithClassValues"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused_by_their_full_name(tmp_path, value, name):
    torch.save(old_payload(val_ppls=[value], config={"note": value}), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=f"refused: it names '{name}'; .* save it again where it was written"):
        import_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("named", [b"src.a os\nsystem", b"src.a;os\nsystem", b"srcx.a\nB", b"src\nos\\x2esystem"])
def test_odd_names_do_not_pass_for_a_configuration_class(tmp_path, named):
    pickles = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    (tmp_path / "odd.pt").write_bytes(b"".join(pickles) + b"\x80\x02c" + named + b"\n)\x81." + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match="refused: it "):
        import_checkpoint(tmp_path / "odd.pt")


def test_an_attribute_that_hides_a_method_changes_nothing(tmp_path):
    payload = old_payload()
    payload["model_state_dict"].keys = collections.OrderedDict  # stored with the dictionary, as its metadata is
    torch.save(payload, tmp_path / "old.pt")
    assert dict(torch.load(tmp_path / "old.pt", weights_only=True)["model_state_dict"]) == {}  # the control
    assert import_checkpoint(tmp_path / "old.pt").config.hidden_dim == 7


# --- damage and other models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_file_is_one_message(tmp_path, legacy):
    data = write_old(tmp_path / "old.pt", legacy=legacy).read_bytes()
    for length in (0, 1, 3, 30, 500, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=f"cut.pt: not a file of torch.save that can be read .{length:,} byt"):
            import_checkpoint(tmp_path / "cut.pt")


def test_a_changed_number_in_a_zip_file_is_noticed(tmp_path, old):
    data = bytearray(old.read_bytes())
    place = data.index(old_weights()["fnn_layers.3.weight"].tobytes())
    data[place + 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    assert torch.load(io.BytesIO(data), weights_only=False, pickle_module=_blind()) is not None  # torch says nothing
    with pytest.raises(CheckpointError, match=r"flipped.pt: .* does not have its recorded checksum"):
        import_checkpoint(tmp_path / "flipped.pt")


def _blind():
    """The module pickle with an unpickler that makes a dictionary of every unknown class."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return plain_class() if module.startswith("src") else super().find_class(module, name)

    blind = type(sys)("blind")
    blind.__dict__.update(pickle.__dict__ | {"Unpickler": Unpickler})
    return blind


def test_what_is_no_file_of_the_series_is_said(tmp_path):
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint\n")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": 1, "epoch": 2}, tmp_path / "keys.pt")
    torch.save({"model_state_dict": [1]}, tmp_path / "no tensors.pt")
    save_checkpoint(tmp_path / "own.pt", {"model": {}}, step=1)
    for name, words in (
        ("text", "not a file of torch.save that can be read .29 bytes.: truncated, damaged or of another kind"),
        ("list", "not a file of the experiment series .it holds no dictionary"),
        ("keys", "not a whole file of the experiment series: model_state_dict missing; it holds 'epoch', 'weights'"),
        ("no tensors", "model_state_dict is not a dictionary of tensors"),
        ("own", "a checkpoint of newllm_lib itself, which needs no import"),
    ):
        with pytest.raises(CheckpointError, match=words):
            import_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        import_checkpoint(tmp_path / "none.pt")


NONE = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forget_gate.bias": None}, "lacks 'forget_gate.bias'; the hidden layers"),
        ({"fnn_layers.3.weight": None}, "lacks 'fnn_layers.6.bias', 'fnn_layers.6.weight'|lacks 'fnn_layers.3.weight'"),
        ({"fnn_layers.0.weight": None, "fnn_layers.0.bias": None}, "lacks 'fnn_layers.0.bias', 'fnn_layers.0.weight'"),
        ({"fnn_layers.1.weight": np.ones((7, 7), np.float32)}, "lacks 'fnn_layers.9.bias', 'fnn_layers.9.weight'"),
        ({"attention.weight": NONE}, "holds the unexpected 'attention.weight'; the hidden layers"),
        (
            {"context_norm.weight": np.ones((4, 1), np.float32)},
            r"context_norm.weight is torch.float32 of shape \(4, 1\)",
        ),
        (
            {"token_output.bias": np.ones(34, np.int64)},
            r"token_output.bias is torch.int64 of shape \(34,\): must hold fl",
        ),
        ({"token_embedding.weight": np.ones((34, 0), np.float32)}, "token_embedding.weight is torch.float32 of shape"),
        (
            {"fnn_layers.0.weight": np.ones((7, 8), np.float32)},
            r"fnn_layers.0.weight has shape \(7, 8\): must be \(7, 9\) beside the others \(vocabulary 34, embedding 5, "
            r"hidden width 7, context 4\)",
        ),
        (
            {"fnn_layers.6.weight": np.ones((7, 6), np.float32)},
            r"fnn_layers.6.weight has shape \(7, 6\): must be \(7, 7\)",
        ),
        ({"input_gate.weight": np.ones((3, 7), np.float32)}, r"input_gate.weight has shape \(3, 7\): must be \(4, 7\)"),
        ({"token_output.bias": np.ones(33, np.float32)}, r"token_output.bias has shape \(33,\): must be \(34,\)"),
        (
            {"context_update.bias": np.array([1, np.nan, 2, -np.inf], np.float32)},
            "context_update.bias holds 2 of 4 values that are not finite",
        ),
        (
            {"context_update.bias": np.array([1, 1e300, 2, 3])},
            "context_update.bias holds 1 of 4 values that are not finite",
        ),
    ],
)
def test_tensors_that_make_no_model_are_named(tmp_path, changes, words):
    weights = {name: value for name, value in (old_weights() | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"old\.pt: (model_state_dict )?({words})"):
        import_checkpoint(write_old(tmp_path / "old.pt", weights))


def test_a_vocabulary_that_no_model_can_have_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab_size = 4: must be a whole number from 5"):
        import_checkpoint(write_old(tmp_path / "old.pt", old_weights(vocab_size=4)))


# --- the folder of a run ----------------------------------------------------------------------------------------


def test_an_import_leaves_the_folder_of_a_run(tmp_path, text, old):
    folder = import_run(old, data=str(text), results_dir=tmp_path / "results")
    assert folder == tmp_path / "results" / "best_l4"
    assert contents(tmp_path / "results") == ["best_l4"]
    assert contents(folder) == ["curves.png", "history.csv", "model", "report.md", "run.json"]
    assert contents(folder / "model") == ["config.json", "data.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert tuple(rows[0]) == HISTORY_COLUMNS
    given = [{key: value for key, value in row.items() if value} for row in rows]
    assert given == [
        {"epoch": "1", "train_loss": "3.6", "val_loss": "3.5", "val_ppl": "33.1"},
        {"epoch": "2", "train_loss": "3.3", "val_loss": "3.25", "val_ppl": "25.8"},
        {"epoch": "3", "train_loss": "3.2", "val_loss": "3.4", "val_ppl": "30.0"},
    ]
    run = nl.load(folder)
    assert (run.record["status"], run.record["published_protocol"]) == ("imported", False)
    assert (run.best["epoch"], run.best["val_ppl"], run.best["step"]) == (2, 25.8, None)
    assert run.record["environment"]["device_name"] is None  # this machine did not train it
    assert run.config.model == ModelConfig(**SHAPE, dropout=0.2)
    assert (run.config.train.batch_size, run.config.train.lr, run.config.train.epochs) == (2048, 8e-4, 50)
    assert run.config.data.sequence_length == 12
    unknown = run.record["imported"]["unknown"]
    assert {"optimizer", "seed", "stride", "precision", "init_std"} <= set(unknown)
    assert not {"batch_size", "lr", "epochs", "dropout", "hidden_dim", "vocab_size"} & set(unknown)


def test_the_imported_run_is_used_like_any_other(tmp_path, text, old):
    folder = import_run(str(old), data=str(text), results_dir=tmp_path / "results", name="mine")
    assert folder.name == "mine"
    model, tokenizer, *_ = load_model(folder)
    expected, _ = old_logits(old_weights(), TOKENS)
    np.testing.assert_allclose(model(torch.tensor([TOKENS]))[0][0].detach().numpy(), expected, atol=1e-5)
    counts = collections.Counter((text / "train.txt").read_text().split())
    assert tokenizer.words[4:8] == tuple(word for word, _ in counts.most_common(4))
    assert tokenizer.vocab_size == 34
    assert nl.evaluate(nl.load(folder)).tokens == 121
    assert "w" in nl.generate_text(model, tokenizer, "w3 w4", seed=1)


def test_the_report_says_what_is_known_and_what_is_not(tmp_path, text, old):
    written = (import_run(old, data=str(text), results_dir=tmp_path) / "report.md").read_text()
    for line in (
        "Best validation perplexity **25.80** after epoch 2. Status: imported.",
        "| weights | after epoch 3, the last of the history; its best was epoch 2 (PPL 25.80), whose weights this file "
        "does not hold |",
        "| config | an object of src.utils.config.NewLLMConfig |",
        "| recognised | batch_size = 2048, lr = 0.0008, epochs = 50, dropout = 0.2, sequence_length = 12, patience = "
        "30 |",
        "| not recognised | gradient_clip = 1, device = 'cuda', use_amp = True |",
        "| unknown | every other setting of the recipe; in run.json the published baseline stands for it |",
        "| data | text: 40 training and 12 validation texts; that the run used them is assumed, the file does not "
        "tell |",
        "| tokenizer | made again: the 30 most frequent words of the training split of text; the file holds none |",
        "| loss | 3.2500 | as the file has it: means of batches, weighted by rows |",
        "|  | 1.00 | 33.10 |  | 3.5000 | 3.6000 |  |  |  |",
        "|  | 2.00 | **25.80** |  | 3.2500 | 3.3000 |  |  |  |",
    ):
        assert line in written.split("\n"), line
    assert "Seed unknown." in written
    assert "scored here" not in written
    assert written.count("> **w") == 3  # samples
    assert "None" not in written


@pytest.mark.slow
def test_the_weights_are_scored_when_asked(tmp_path, text, old, monkeypatch):
    doubtful = import_run(old, data=str(text), results_dir=tmp_path, name="doubtful", evaluate=True)
    scores = read_record(doubtful)["imported"]["scores"]
    again = nl.evaluate(doubtful)
    assert scores["perplexity"] == pytest.approx(again.perplexity)
    line = (
        f"PPL {again.perplexity:.2f}, accuracy {again.accuracy:.1%} over 121 validation targets, weighted by tokens; "
    )
    theirs = "the history's own figure for these weights is"
    doubted = f"{line}{theirs} 30.00 ({abs(again.perplexity / 30 - 1):.1%} apart): THEY DIFFER, so the text or the "
    assert doubted in (doubtful / "report.md").read_text()
    assert read_record(doubtful)["validation"]["digest"] is None  # what was scored then is not known
    ppls = [33.1, 25.8, again.perplexity * 1.01]
    path = write_old(tmp_path / "agreeing.pt", val_ppls=ppls)
    agreeing = import_run(path, data=str(text), results_dir=tmp_path, evaluate=True)
    assert f"{line}{theirs} {ppls[2]:.2f} (1.0% apart) |" in (agreeing / "report.md").read_text()
    assert len(read_record(agreeing)["validation"]["digest"]) == 64
    monkeypatch.setattr(published, "VALIDATION_DIGEST", read_record(agreeing)["validation"]["digest"])
    for file, compares in ((path, True), (old, False)):
        again = import_run(file, data=str(text), results_dir=tmp_path / "again", evaluate=True)
        assert read_record(again)["published_protocol"] is compares
    path = write_old(tmp_path / "silent.pt", val_ppls=[33.1, 25.8, float("nan")])
    silent = import_run(path, data=str(text), results_dir=tmp_path, evaluate=True)
    assert f"{line}the history has no figure for these weights |" in (silent / "report.md").read_text()


def test_lists_of_different_lengths_and_odd_numbers_are_taken_and_told(tmp_path, text):
    nan = float("nan")
    path = write_old(
        tmp_path / "odd.pt", train_losses=[3.6, 3.3, 3.2, 3.1], val_losses=[3.5, nan, 3.0], val_ppls=[33.1, nan],
        train_ppls=[], current_epoch=9,
    )  # fmt: skip
    run = nl.load(import_run(path, data=str(text), results_dir=tmp_path))
    assert run.history["train_loss"].tolist() == [3.6, 3.3, 3.2, 3.1]
    assert run.history["val_ppl"].iloc[2] == pytest.approx(20.0855369)  # exp(3)
    assert run.history[["val_loss", "val_ppl"]].iloc[3].isna().all()
    assert run.best["epoch"] == 3
    assert run.record["imported"]["notes"] == [
        "its lists have different lengths (train_losses 4, val_losses 3, train_ppls 0, val_ppls 2): the first value of "
        "each is taken as epoch 1",
        "its current_epoch is 9, which does not fit them",
    ]
    json.loads((run.folder / "run.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_a_file_from_before_the_first_epoch_gives_a_run_without_curves(tmp_path, text):
    path = write_old(tmp_path / "early.pt", **{key: [] for key in HISTORY} | {"current_epoch": 0})
    folder = import_run(path, data=str(text), results_dir=tmp_path)
    assert contents(folder) == ["history.csv", "model", "report.md", "run.json"]
    assert "Status: imported. No validation yet." in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_losses": [3.5, "3.2"]}, r"val_losses\[1\] is of type str: must be a number"),
        ({"val_ppls": [True]}, r"val_ppls\[0\] is of type bool: must be a number"),
        ({"train_losses": [10**400]}, r"train_losses\[0\] is of type int: must be a number"),
        ({"train_ppls": 3.0}, "train_ppls is of type float: must be a list of numbers"),
    ],
)
def test_histories_that_are_no_numbers_are_named(tmp_path, text, changes, words):
    with pytest.raises(CheckpointError, match=words):
        import_run(write_old(tmp_path / "old.pt", **changes), data=str(text), results_dir=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_needs_the_histories_and_a_model_does_not(tmp_path, text):
    payload = old_payload()
    del payload["val_losses"], payload["current_epoch"], payload["optimizer_state_dict"]
    torch.save(payload, tmp_path / "bare.pt")
    with pytest.raises(
        CheckpointError, match=r"not a whole file .* series: val_losses, current_epoch missing; it holds"
    ):
        import_run(tmp_path / "bare.pt", data=str(text), results_dir=tmp_path)
    assert import_checkpoint(tmp_path / "bare.pt").config.num_layers == 3


def test_a_folder_that_is_there_is_never_touched(tmp_path, text, old):
    (tmp_path / "best_l4").mkdir()
    (tmp_path / "best_l4" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="best_l4: is there already; give the import another name"):
        import_run(old, data=str(text), results_dir=tmp_path)
    assert contents(tmp_path / "best_l4") == ["precious.txt"]
    with pytest.raises(ValueError, match=r"name = 'a/b': must be a plain folder name"):
        import_run(old, data=str(text), results_dir=tmp_path, name="a/b")


def test_nothing_half_written_is_left(tmp_path, text, old, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", fail)  # the last file of the folder
    with pytest.raises(OSError, match="No space left"):
        import_run(old, data=str(text), results_dir=tmp_path / "results")
    assert contents(tmp_path / "results") == []


def test_a_text_with_another_vocabulary_is_refused(tmp_path, write_corpus, old):
    words = r"data corpus: the vocabulary of its training split has 15 ids, the model in .*best_l4\.pt has 34: name the"
    with pytest.raises(ValueError, match=words):
        import_run(old, data=write_corpus(), results_dir=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_text_that_cannot_be_had_is_told_as_anywhere(tmp_path, old, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("newllm_lib.data.corpus._why_no_hub", lambda: "no connection to the hub")
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"data wikitext-2: cannot be loaded .* or set data"):
        import_run(old, results_dir=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_preset_must_have_the_same_shape(tmp_path, text, old):
    with pytest.raises(
        ValueError, match=r"preset 'l4_fp16' has vocab_size 1000, .*best_l4.pt has 34: it is not that run"
    ):
        import_run(old, data=str(text), results_dir=tmp_path, preset="l4_fp16")
    with pytest.raises(ValueError, match=r"unknown preset 'l4_fp61'\. Did you mean 'l4_fp16'"):
        import_run(old, data=str(text), results_dir=tmp_path, preset="l4_fp61")


def test_a_published_run_stands_beside_the_published_figures(tmp_path, wikitext):
    shape = {"vocab_size": 1000, "embed_dim": 256, "hidden_dim": 512, "num_layers": 6, "context_dim": 256}
    weights = {name: 0.05 * value for name, value in old_weights(**shape).items()}
    ppls, losses = [87.5, 46.9, 26.03], [4.47, 3.85, 3.2594]
    path = write_old(
        tmp_path / "best.pt", weights, {"batch_size": 2048}, val_ppls=ppls, val_losses=losses, current_epoch=3
    )
    folder = import_run(path, data=wikitext, results_dir=tmp_path, preset="l4_fp16")
    run = nl.load(folder)
    assert run.record["parameters"] == 2_739_432
    assert run.record["published_protocol"] is True
    assert run.record["data"]["training_sequences"] == 51_026
    assert run.tokenizer.words[4:8] == ("the", ",", ".", "of")
    written = (folder / "report.md").read_text()
    assert (
        "| 26.03 | L4 FP16, square-root rule: 50 epochs, 10 min on an L4 | unknown | epoch 3 (PPL 26.03) |" in written
    )
    assert "| 23.34 | CPU baseline: 27 epochs, about 27 h | not reached |  |" in written
    assert "| published | 26.03 | L4 FP16, square-root rule, 50 epochs. |" in written
    assert "in run.json the preset l4_fp16 stands for it" in written
    assert "after epoch 3, the last of the history and its best" in written


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def newllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = Messages("newllm", commands={"import": import_})
    return lambda *arguments: CliRunner().invoke(group, ["import", *map(str, arguments)])


def test_the_command_tells_what_was_found(newllm, text, old):
    result = newllm("best_l4.pt", "--data", "text", "--evaluate", "--name", "mine", "--results-dir", "kept")
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n")
    shape = "728 parameters (3 layers of 7, embedding 5, context 4, vocabulary 34), by the tensors' shapes"
    assert f"         model  {shape}" in lines
    history = "       history  3 epochs, best validation perplexity 25.80 after epoch 2, as the file has it"
    assert any(line.startswith(history) for line in lines)
    assert "not recognised  gradient_clip = 1, device = 'cuda', use_amp = True" in lines
    assert any(line.startswith("   scored here  PPL ") for line in lines)
    assert lines[-2] == "written to kept/mine/: report.md, curves.png, history.csv, run.json, model/"
    assert nl.load("kept/mine").best["val_ppl"] == 25.8


def test_the_command_speaks_json_and_fails_with_one_message(newllm, text, old):
    result = newllm("best_l4.pt", "--data", "text", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["folder"], printed["status"]) == ("results/best_l4", "imported")
    assert printed["imported"]["recognised"]["batch_size"] == 2048
    again = newllm("best_l4.pt", "--data", "text")
    assert again.exit_code == 1
    assert again.stderr == (
        "Error: results/best_l4: is there already; give the import another name, or move that folder away\n"
    )
    assert newllm("none.pt").exit_code == 1
    assert "--evaluate" in newllm("--help").stdout


def test_training_never_replaces_an_imported_run(tmp_path):
    text = write_text(tmp_path / "text")
    folder = nl.import_run(write_old(tmp_path / "old.pt"), data=str(text), results_dir=tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = tiny_config(text, results_dir=str(tmp_path), name="old")
    with pytest.raises(CheckpointError, match="old: an imported run: it has weights, but no training state"):
        nl.train(config)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    nl.train(config, fresh=True, epochs=1)
    assert nl.load(tmp_path / "old.old-1").record["status"] == "imported"


def test_an_old_file_travels_from_the_shell_with_the_same_logits_at_each_step(old, text, tmp_path, monkeypatch):
    """Imported, scored, written with, exported, bundled, opened elsewhere."""
    monkeypatch.chdir(tmp_path)

    def newllm(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    expected = torch.from_numpy(old_logits(old_weights(), TOKENS)[0]).float()

    def same(place):
        torch.testing.assert_close(load_model(place).model(torch.tensor([TOKENS]))[0][0], expected, rtol=0, atol=1e-5)

    newllm("import", old, "--data", text, "--name", "old")
    same("results/old")
    assert json.loads(newllm("evaluate", "results/old", "--json"))["tokens"] > 0
    written = newllm("generate", "results/old", "--prompt", "w1", "--seed", 1, "--tokens", 8)
    newllm("export", "results/old", "model")
    same("model")
    newllm("bundle", "results/old", "--out", "old.zip")
    newllm("open", "old.zip", "--results-dir", "elsewhere")
    same("elsewhere/old")
    assert newllm("generate", "elsewhere/old", "--prompt", "w1", "--seed", 1, "--tokens", 8) == written
