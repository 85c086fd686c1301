"""Runs beside each other: which scores compare, what is shown of them, and what damaged folders say."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from published_format import write_old
from tiny import write_text

from newllm_lib.cli import Messages
from newllm_lib.cli import compare as compare_command
from newllm_lib.config import RunConfig, presets, published
from newllm_lib.reporting import comparison
from newllm_lib.reporting.comparison_report import compare, picture, table_text
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.record import write_history, write_record
from newllm_lib.sharing.legacy import import_run

TEXT, OTHER_TEXT = "a" * 64, "b" * 64
PUBLISHED = {"digest": published.VALIDATION_DIGEST, "published_protocol": True}
LOSSLESS = {"val_bits_per_byte": 2.5, "val_word_ppl": 900.0}


def row(step, ppl, **changes):
    """A validation of a run of 100 steps an epoch that takes half a second a step."""
    return {
        "step": step, "epoch": step / 100, "train_loss": 3.0, "val_loss": math.log(ppl), "val_ppl": ppl,
        "val_accuracy": 0.25, "val_ppl_known": 2 * ppl, "val_bits_per_byte": None, "val_word_ppl": None, "lr": 1e-3,
        "clip": 1.0, "train_seconds": step / 2, "tokens_per_second": 1.0, "peak_memory_bytes": 2**30,
        "skipped_steps": 0,
    } | changes  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A function that writes a run's folder as a run does; `digest=None` writes it as older versions did."""

    def write(name, *rows, digest="d", fingerprint=TEXT, published_protocol=False, record=None, **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = RunConfig(preset="auto").replace(**settings)
        write_history(folder, list(rows))
        write_record(
            folder,
            {
                "run": folder.name, "preset": "auto", "status": "finished", "parameters": config.model.num_parameters,
                "published_protocol": published_protocol, "faithful": None, "faithful_reason": None,
                "decided": {"batch_size": config.train.batch_size, "precision": "bf16", "engine": "fused"},
                "plan": [("engine", "fused"), ("rate", "0.004: 0.004 at batch 128")], "step": 7,
                "data": {"name": "some text", "fingerprint": fingerprint, "training_tokens": 10_000},
                "validation": {"tokens": 9, "unknown_share": 0.3} | ({"digest": digest} if digest else {}),
                "environment": {"device": "cpu", "device_name": "Some CPU", "threads": 2}, "config": config.to_dict(),
                "best": best_row(list(rows)), "peak_memory_bytes": 2**30,
            } | (record or {}),
        )  # fmt: skip
        return folder

    return write


def groups_of(*folders):
    frame = compare(folders, published=False)
    return dict(zip(frame["run"], frame["group"], strict=True))


# --- one run ----------------------------------------------------------------------------------------------------


def test_the_figures_of_a_run(make):
    folder = make("one", row(100, 30.0), row(200, 20.0), row(300, 25.0), batch_size=64, optimizer="muon")
    frame = compare([folder])
    found = frame.loc[1].to_dict()
    expected = {
        "run": "one", "published": False, "group": "A", "rank": 1, "preset": "auto", "data": "some text",
        "tokenizer": "words", "parameters": 2_739_432, "batch_size": 64, "lr": 0.004, "optimizer": "muon",
        "precision": "bf16", "engine": "fused", "device": "Some CPU, 2 threads", "peak_memory_bytes": 2**30,
        "val_ppl": 20.0, "val_accuracy": 0.25, "val_ppl_known": 40.0,  # of the best validation
        "epochs": 3.0, "steps": 300, "tokens_seen": 30_000, "train_seconds": 150.0, "tokens_per_second": 200.0,
        "status": "finished", "faithful": None, "folder": str(folder), "note": None,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["val_loss"] == pytest.approx(2.995732)  # ln 20
    assert math.isnan(found["val_bits_per_byte"])
    assert list(frame.columns) == list(comparison.COLUMNS)


def test_a_rate_that_was_given_is_exact_and_a_gpu_has_no_threads(make):
    machine = {"device": "cuda:0", "device_name": "L4", "threads": 8}
    frame = compare([make("one", row(100, 30.0), lr=0.00123456, record={"environment": machine})])
    assert (frame["lr"][1], frame["device"][1]) == (0.00123456, "L4")


def test_runs_are_folders_or_have_one_and_count_once(make, monkeypatch, tmp_path):
    folder = make("one", row(100, 30.0))
    assert len(compare(str(folder))) == 1
    assert len(compare(SimpleNamespace(folder=folder))) == 1
    monkeypatch.chdir(tmp_path)
    assert len(compare([folder, SimpleNamespace(folder=folder), "one", Path("one/../one")])) == 1
    with pytest.raises(ValueError, match="at least one run"):
        compare([])


def test_runs_of_the_same_name_are_told_apart(make):
    folders = [make("a/run", row(1, 9.0)), make("b/run", row(1, 8.0)), make("c/other", row(1, 7.0))]
    assert list(compare(folders)["run"]) == ["other", "b/run", "a/run"]


# --- which scores compare ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": "sentencepiece"}, "other tokenizer (sentencepiece, not words)"),
        ({"vocab_size": 500}, "other vocab_size (500, not 1000)"),
        ({"fingerprint": OTHER_TEXT}, "other text sha256 (bbbbbbbbbbbbbbbb, not aaaaaaaaaaaaaaaa)"),
        ({"sequence_length": 128}, "other sequence_length (128, not 64)"),
        ({"stride": 63}, "other stride (63, not 32)"),
        ({"min_words": 1}, "other min_words (1, not 5)"),
        ({"layout": "stream"}, "other layout (stream, not windows)"),
        ({"vocab_size": 500, "stride": 63}, "other vocab_size (500, not 1000); other stride (63, not 32)"),
        ({}, "other validation ids, though text and settings are recorded as equal"),
    ],
)
def test_other_ids_are_another_group_and_the_reason_is_told(make, changes, words):
    first, second = make("first", row(100, 30.0)), make("second", row(100, 9.0), digest="other", **changes)
    frame = compare([first, second], published=False)
    assert list(frame["run"]) == ["first", "second"]  # not by perplexity
    assert list(frame["group"]) == ["A", "B"]
    assert list(frame["rank"]) == [1, 1]
    assert frame.attrs["notes"][0] == f"Perplexities of B compare with no other group's. Beside A: {words}."


@pytest.mark.parametrize("changes", [{"stride": 63}, {"dropout": 0.5, "seed": 3}, {"text_unit": "paragraph"}])
def test_equal_ids_are_one_group_whatever_made_them(make, changes):
    first, second = make("first", row(100, 30.0)), make("second", row(100, 9.0), **changes)
    frame = compare([first, second], published=False)
    assert list(zip(frame["run"], frame["rank"], strict=True)) == [("second", 1), ("first", 2)]
    assert set(frame["group"]) == {"A"}
    assert frame.attrs["notes"] == []


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, "A"),
        ({"data": "elsewhere", "validation_fraction": 0.1, "eval_lanes": 4, "sentencepiece_model": "unigram"}, "A"),
        ({"stride": 63}, "B"),
        ({"fingerprint": OTHER_TEXT}, "B"),
        ({"vocab_size": 500}, "B"),
    ],
)
@pytest.mark.parametrize("digest", ["d", None])
def test_without_a_hash_text_and_settings_stand_for_the_ids(make, digest, changes, group):
    """What the layout or the tokenizer does not read, and where the text lies, makes no difference."""
    first, older = make("first", row(1, 9.0), digest=digest), make("older", row(1, 8.0), digest=None, **changes)
    assert groups_of(first, older) == {"first": "A", "older": group}
    assert any("No hash of the validation ids" in note for note in compare(older).attrs["notes"])


def test_lanes_count_in_a_stream_and_strides_do_not(make):
    first = make("first", row(1, 9.0), digest=None, layout="stream")
    same = make("same", row(1, 9.0), digest=None, layout="stream", stride=5, min_words=0)
    other = make("other", row(1, 9.0), digest=None, layout="stream", eval_lanes=8)
    assert groups_of(first, same, other) == {"first": "A", "same": "A", "other": "B"}


def test_an_older_record_of_the_published_protocol_joins_the_newer_ones(make):
    older = make("older", row(1, 9.0), digest=None, published_protocol=True)
    assert groups_of(older, make("newer", row(1, 8.0), fingerprint=OTHER_TEXT, **PUBLISHED)) == {
        "older": "A",
        "newer": "A",
    }


def test_equal_perplexities_share_a_rank(make):
    frame = compare([make(name, row(1, ppl)) for name, ppl in (("a", 9.0), ("b", 8.0), ("c", 8.0), ("d", 8.5))])
    assert list(zip(frame["run"], frame["rank"], strict=True)) == [("b", 1), ("c", 1), ("d", 3), ("a", 4)]


def test_what_else_compares_between_groups(make):
    def notes(*folders):
        return [note for note in compare(folders, published=False).attrs["notes"] if "Perplex" not in note]

    words = make("words", row(1, 9.0))
    pieces = make("bpe", row(1, 9.0, **LOSSLESS), digest="p", tokenizer="sentencepiece")
    unigram = make("u", row(1, 9.0, **LOSSLESS), digest="u", tokenizer="sentencepiece", sentencepiece_model="unigram")
    elsewhere = make("e", row(1, 9.0, **LOSSLESS), digest="e", tokenizer="sentencepiece", fingerprint=OTHER_TEXT)
    bits = (
        "Bits per byte compare across B and C: the same text, of which nothing is lost. But how windows overlap and "
        "which short texts are skipped may differ."
    )
    shared = (
        "hold the same text. To score two models on the words that both know: newllm compare RUN RUN --shared-words"
    )
    assert notes(words, pieces, unigram, elsewhere) == [bits, f"A and B and C {shared}"]
    assert notes(words, pieces) == [f"A and B {shared}"]
    assert notes(pieces, elsewhere) == notes(words, elsewhere) == []


# --- the published runs -----------------------------------------------------------------------------------------


def test_published_runs_stand_beside_those_that_scored_their_ids(make):
    frame = compare([make("mine", row(100, 22.0), **PUBLISHED)])
    assert list(frame["run"]) == [
        "published: l4_5_layers", "published: l4_fp16_extended", "mine", "published: cpu_baseline",
        "published: l4_fp16", "published: l4_fp16_linear", "published: l4_advanced", "published: l4_fp16_unscaled",
    ]  # fmt: skip
    assert list(frame["rank"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(frame["published"]) == [True, True, False, True, True, True, True, True]
    assert set(frame["group"]) == {"A"}
    baseline = frame.loc[4].to_dict()
    expected = {
        "steps": 43_065, "tokens_seen": 74_209_122, "train_seconds": 97_200.0, "epochs": 27.0, "batch_size": 32,
        "lr": 1e-4, "optimizer": "adam", "precision": "fp32", "device": "CPU", "val_ppl": 23.34, "val_accuracy": 0.31,
        "status": "published",
    }  # fmt: skip
    assert {name: baseline[name] for name in expected} == expected
    assert baseline["note"].startswith("31.0 % is implausible")
    assert frame["train_seconds"].isna().tolist() == [False] * 7 + [True]  # the unscaled run's time is not known


def test_published_runs_are_left_out_elsewhere_and_on_request(make):
    elsewhere, there = make("mine", row(1, 9.0)), make("there", row(1, 9.0), **PUBLISHED)
    assert compare(elsewhere).attrs["notes"] == [
        "The published runs are left out: none of these scored the ids that their figures hold for."
    ]
    assert list(compare(there, published=False)["run"]) == ["there"]
    both = compare([elsewhere, there])
    assert list(both["group"]) == ["A"] + ["B"] * 8


def test_what_is_assumed_of_the_published_runs_is_so(repository):
    for name, known in published.RUNS.items():
        values, config = comparison._published(name, known).values, presets.get(name)
        assert values["parameters"] == config.model.num_parameters
        assert (values["optimizer"], values["precision"]) == (config.train.optimizer, config.train.precision)
    data = json.loads((repository / "results/reference/quickstart/run.json").read_text())["data"]
    assert data["training_sequences"] == comparison.PUBLISHED_SEQUENCES
    assert data["training_tokens"] == comparison.PUBLISHED_TOKENS


def test_the_committed_runs_compare_with_the_published_ones(repository, tmp_path):
    """Older records, without a hash of the ids, and histories without the columns of lossless tokenizers."""
    names = ("cpu_baseline_1_epoch", "quickstart", "quickstart_fused")
    frame = compare([repository / "results/reference" / name for name in names], out=tmp_path)
    assert set(frame["group"]) == {"A"}
    ranks = dict(zip(frame["run"], frame["rank"], strict=True))
    assert (ranks["quickstart_fused"], ranks["quickstart"], ranks["cpu_baseline_1_epoch"]) == (3, 4, 10)
    assert frame["val_bits_per_byte"].isna().all()
    assert frame["tokens_seen"][3] == 2_686_370  # 0.9774 epochs of 2,748,486 targets


# --- unfinished, imported and damaged ---------------------------------------------------------------------------


def test_runs_without_a_validation_or_with_gaps_have_their_row(make, tmp_path):
    begun = make("begun", record={"status": "running"})
    (make("just begun", record={"status": "running"}) / "history.csv").unlink()
    gaps = {"val_accuracy": None, "lr": None, "train_seconds": None, "tokens_per_second": None, "epoch": None}
    imported = make(
        "imported", row(10, 40.0, **gaps), row(20, 30.0, **gaps), digest=None, fingerprint=None,
        record={"status": "imported", "plan": [], "decided": {}, "environment": None, "preset": None,
                "config": {"model": {"vocab_size": 1000}}, "peak_memory_bytes": None, "parameters": None},
    )  # fmt: skip
    failed = make("failed", row(10, 50.0), row(20, math.inf), row(30, math.nan), record={"status": "failed"})
    frame = compare([begun, tmp_path / "just begun", imported, failed], out=tmp_path / "out")
    rows = {found["run"]: found for found in frame.to_dict("records")}
    assert {name: found["status"] for name, found in rows.items()} == {
        "failed": "failed", "begun": "running", "just begun": "running", "imported": "imported",
    }  # fmt: skip
    assert (rows["failed"]["val_ppl"], rows["failed"]["rank"], rows["failed"]["steps"]) == (50.0, 1, 30)
    assert frame["rank"].isna().tolist() == [False, True, True, False]
    assert (rows["begun"]["steps"], rows["begun"]["group"]) == (7, "A")
    assert (rows["imported"]["val_ppl"], rows["imported"]["group"]) == (30.0, "B")
    missing = {"val_accuracy", "lr", "train_seconds", "tokens_seen", "tokens_per_second", "device", "peak_memory_bytes"}
    assert missing <= {name for name, found in frame.loc[4].isna().items() if found}
    assert "Beside A: what was scored is not recorded." in frame.attrs["notes"][0]
    json.loads((tmp_path / "out/comparison.json").read_text(), parse_constant=pytest.fail)


def test_imported_runs_claim_no_more_than_their_files(tmp_path):
    """What a file does not tell is not shown as known; what scored otherwise than its history is not grouped."""
    text = str(write_text(tmp_path / "text"))
    told, silent = write_old(tmp_path / "told.pt"), write_old(tmp_path / "silent.pt", settings={"max_seq_length": 12})
    folders = [import_run(path, data=text, results_dir=tmp_path / "results") for path in (told, silent)]
    for name in ("doubtful", "as doubtful"):  # two of them share no group either
        folders.append(import_run(told, data=text, results_dir=tmp_path / "results", name=name, evaluate=True))
    frame = compare(folders)
    rows = {found["run"]: found for found in frame.to_dict("records")}
    assert (rows["told"]["batch_size"], rows["told"]["lr"], rows["told"]["group"]) == (2048, 8e-4, "A")
    assert frame.loc[2, ["batch_size", "lr"]].isna().all()
    assert (rows["silent"]["optimizer"], rows["silent"]["group"]) == (None, "A")
    assert (rows["doubtful"]["group"], rows["as doubtful"]["group"]) == ("B", "C")
    assert {found["status"] for found in rows.values()} == {"imported"}
    assert [found["val_ppl"] for found in rows.values()] == [25.8] * 4
    assert set(frame["note"]) == {"imported; that it scored this text is assumed, unknown settings are left out"}


def _remove_history(folder):
    (folder / "history.csv").unlink()


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


def _record(**changes):
    def damage(folder):
        write_record(folder, json.loads((folder / "run.json").read_text()) | changes)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove_history, "run.json or history.csv is damaged: not what a run writes (FileMissingError"),
        (
            _write("history.csv", ""),
            "history.csv: damaged, not a table that can be read (No columns to parse from file)",
        ),
        (
            _write("history.csv", "no table\nof a run\n"),
            "history.csv: damaged, no numbers in the columns step, epoch, val_loss, val_ppl",
        ),
        (_write("history.csv", "step,val_ppl\n1,much\n"), "no numbers in the columns epoch, val_loss, val_ppl"),
        (
            _write("history.csv", "step,val_ppl\n1,2,3,4\n1,2\n1,2,3,4,5,6\n"),
            "history.csv: damaged, not a table that can be read (Error tokenizing data",
        ),
        (_record(best={"val_ppl": "low"}), "run.json: damaged, best.val_ppl, best.step, best.val_loss not what a run"),
        (_record(config=[1]), "run.json: damaged, config not what a run writes"),
        (_record(data="text"), "run.json: damaged, data not what a run writes"),
        (_write("run.json", '{"run": '), "not readable as JSON"),
    ],
    ids=["no history", "empty", "no table", "words", "ragged", "best", "config", "data", "record"],
)
def test_a_damaged_folder_is_named(make, damage, words):
    good, folder = make("good", row(1, 9.0)), make("bad", row(1, 9.0))
    damage(folder)
    with pytest.raises(ValueError) as error:
        compare([good, folder])
    assert str(error.value).startswith(str(folder))
    assert words in str(error.value)


def test_a_place_without_a_run_is_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: no run here"):
        compare([make("good", row(1, 9.0)), tmp_path / "nothing"])


# --- what is written --------------------------------------------------------------------------------------------


def test_the_table_shows_what_differs_once(make):
    first = make("first", row(100, 22.0), row(200, 20.0), batch_size=64, dropout=0.2, optimizer="muon")
    second = make("sec|ond", row(100, 30.0), batch_size=64, dropout=0.1, optimizer="adamw", lr_rule="sqrt")
    text = table_text(comparison.collect([second, first], published=False))
    assert text == (
        "## A: some text (text sha256 aaaaaaaaaaaaaaaa, tokenizer words, vocab_size 1000, layout windows, "
        "sequence_length 64, stride 32, min_words 5)\n\n"
        "| # | run          | perplexity | accuracy | known perplexity | epochs | steps | tokens | time       "
        "| tokens/s | status   |\n"
        "|---|--------------|------------|----------|------------------|--------|-------|--------|------------"
        "|----------|----------|\n"
        "| 1 | first        | **20.00**  | 25.0%    | 40.00            | 2.00   | 200   | 0.02 M | 1 min 40 s "
        "| 200      | finished |\n"
        "| 2 | sec&#124;ond | 30.00      | 25.0%    | 60.00            | 1.00   | 100   | 0.01 M | 50 s       "
        "| 200      | finished |\n\n"
        "Best of these runs: #1 first, PPL 20.00.\n\n"
        "## Set-up\n\n"
        "| # | run          | optimizer |\n"
        "|---|--------------|-----------|\n"
        "| 1 | first        | muon      |\n"
        "| 2 | sec&#124;ond | adamw     |\n\n"
        "The same for all, where known: group A, preset auto, data some text, tokenizer words, parameters 2,739,432, "
        "batch 64, learning rate 0.004, precision bf16, engine fused, device Some CPU, 2 threads, memory 1.00 GiB.\n\n"
        "Other settings that differ:\n\n"
        "- dropout: 0.2 (#1); 0.1 (#2)\n"
    )


def test_notes_on_single_runs_stand_under_the_table(make):
    folder = make("one", row(1, 9.0), record={"faithful": False, "faithful_reason": "dropout is 0.0, not 0.1"})
    text = table_text(comparison.collect(folder))
    assert text.endswith("- one: not faithful: dropout is 0.0, not 0.1\n")
    assert "| faithful |" in text


def test_each_group_has_a_table_of_its_own(make):
    folders = [
        make("first", row(1, 30.0)),
        make("second", row(1, 9.0, **LOSSLESS), digest="o", tokenizer="sentencepiece"),
    ]
    text = table_text(comparison.collect(folders))
    first, second, setup = text.index("## A: "), text.index("## B: "), text.index("## Set-up")
    assert "**30.00**" in text[first:second]
    assert "**9.00**" in text[second:setup]
    assert ("bits a byte" in text[first:second], "bits a byte" in text[second:setup]) == (False, True)
    assert "- Perplexities of B compare with no other group's." in text[setup:]
    assert "sentencepiece_model" not in text[setup:]  # of the protocol, which the headings tell


def test_settings_younger_than_a_record_have_their_default(make):
    old, new = make("old", row(1, 9.0), digest=None), make("new", row(1, 8.0), digest=None, context_clamp=5.0)
    record = json.loads((old / "run.json").read_text())
    for section, name in (("data", "tokenizer"), ("data", "sentencepiece_model"), ("model", "context_clamp")):
        del record["config"][section][name]
    write_record(old, record)
    found = comparison.collect([old, new])
    assert list(found.groups) == ["A"]
    assert [entry["setting.context_clamp"] for entry in found.rows()] == [5.0, 10.0]


def test_the_files(make, tmp_path):
    folders = [
        make("first", row(100, 22.0), row(200, 20.0), **PUBLISHED),
        make("second", row(100, 30.0), digest="other"),
    ]
    out = tmp_path / "new" / "out"
    frame = compare(folders, out=out)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["comparison.csv", "comparison.json", "comparison.md", "comparison.png"]
    stored = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert [found["run"] for found in stored["rows"]] == list(frame["run"])
    assert stored["rows"][0]["val_ppl"] == 20.0
    assert stored["groups"]["B"]["digest"] == "other"
    assert stored["notes"] == frame.attrs["notes"]
    table = list(csv.DictReader((out / "comparison.csv").open(newline="")))
    assert [(found["number"], found["run"], found["batch_size"]) for found in table][:2] == [
        ("1", "first", "32"),
        ("2", "published: l4_5_layers", "2048"),
    ]
    assert set(table[0]) == {"number", *comparison.COLUMNS}
    assert (
        (out / "comparison.md")
        .read_text()
        .startswith("# Comparison of 9 runs\n\n![validation perplexity](comparison.png)")
    )
    assert (out / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- the picture ------------------------------------------------------------------------------------------------


def drawn(figure):
    """x, y and the line itself, for every line of each panel."""
    return [
        [(list(line.get_xdata()), list(line.get_ydata()), line) for line in axes.get_lines()] for axes in figure.axes
    ]


def test_the_panels_show_the_same_perplexities_over_steps_tokens_and_time(make):
    figure = picture(comparison.collect(make("mine", row(100, 22.0), row(200, math.inf), row(400, 21.0))))
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer steps", "tokens seen", "training time"]
    found = [[(x, y) for x, y, _ in panel] for panel in drawn(figure)]
    assert found == [[([100, 400], [22, 21])], [([10_000, 40_000], [22, 21])], [([50, 200], [22, 21])]]
    assert [axes.get_xscale() for axes in figure.axes] == ["linear"] * 3
    assert figure.axes[0].get_yscale() == "linear"


def test_published_curves_are_grey_and_dashed_and_converted(make):
    figure = picture(comparison.collect(make("mine", row(100, 22.0), **PUBLISHED)))
    for panel, first, last in zip(drawn(figure), (25, 2_748_486, 12.0), (1250, 137_424_300, 600.0), strict=True):
        assert [line.get_color() for *_, line in panel] == ["#0072b2", "#555555", "#777777", "#999999"]
        assert [line.is_dashed() for *_, line in panel] == [False, True, True, True]
        x, y, _ = panel[2]  # l4_fp16: 50 epochs of 25 steps in 10 minutes
        assert (x[0], x[-1], y[0], y[-1]) == (first, pytest.approx(last), 87.5, 26.0)
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "3  mine", "4  published: cpu_baseline", "5  published: l4_fp16", "6  published: l4_fp16_linear",
    ]  # fmt: skip


def test_many_runs_are_told_apart_and_groups_have_lines_of_their_own(make):
    folders = [
        make(f"a run with a rather long name number {k:02}", row(1, 9.0 + k), row(9, 8.0 + k)) for k in range(35)
    ]
    folders.append(make("other", row(1, 7.0), row(9, 6.0), digest="other", stride=5))
    figure = picture(comparison.collect(folders))
    lines = [line for *_, line in drawn(figure)[0]]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == 36
    assert [line.is_dashed() for line in lines] == [False] * 35 + [True]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "group A: compare within it only"
    assert texts[1] == "1  a run with a r… name number 00"
    assert texts[-2:] == ["group B: compare within it only", "36  other"]


def test_a_run_that_diverged_does_not_flatten_the_others(make):
    figure = picture(comparison.collect([make("good", row(1, 40.0), row(9, 20.0)), make("bad", row(1, 1e9))]))
    assert figure.axes[0].get_ylim() == (18.0, 1000.0)
    assert figure.axes[0].get_yscale() == "log"


def test_a_picture_without_anything_to_draw_says_so(make):
    figure = picture(comparison.collect(make("begun")))
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["nothing recorded"] * 3


# --- in a shell -------------------------------------------------------------------------------------------------


@pytest.fixture
def newllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = Messages(commands={"compare": compare_command.compare})
    return lambda *arguments: CliRunner().invoke(group, ["compare", *map(str, arguments)])


def test_the_command_prints_the_table_and_writes_nothing(newllm, make, tmp_path):
    make("first", row(1, 9.0), **PUBLISHED)
    result = newllm("first")
    assert result.exit_code == 0
    assert result.stdout == table_text(comparison.collect([tmp_path / "first"]))
    assert "published: l4_fp16" in result.stdout
    assert "published" not in newllm("first", "--no-published").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_the_command_writes_a_folder_and_prints_json_or_csv(newllm, make, tmp_path):
    make("first", row(1, 9.0))
    result = newllm("first", "--out", "here", "--json")
    assert json.loads(result.stdout)["rows"][0]["run"] == "first"
    assert "written to here/: comparison.md, comparison.csv, comparison.json, comparison.png" in result.stderr
    assert len(list((tmp_path / "here").iterdir())) == 4
    result = newllm("first", "--csv")
    assert result.stdout == (tmp_path / "here" / "comparison.csv").read_text()
    assert "The published runs are left out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "Missing argument 'RUN [RUN ...]'"),
        (("first", "--json", "--csv"), 2, "--json and --csv: choose one"),
        (("first", "--data", "x"), 2, "--data and --split belong to --shared-words"),
        (("first", "--shared-words"), 2, "--shared-words takes two runs"),
        (("first", "first", "--shared-words", "--csv"), 2, "neither --csv nor --out"),
        (("first", "gone"), 1, "Error: gone: no run here (there is no run.json in it)"),
    ],
)
def test_wrong_usage_and_failures(newllm, make, arguments, status, words):
    make("first", row(1, 9.0))
    result = newllm(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
