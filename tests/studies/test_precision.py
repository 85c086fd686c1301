"""Two number formats on the same batches: what counts as parting, what is recorded, and how a study goes on."""

import hashlib
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from pandas import DataFrame
from tiny import RECIPE, SHAPE, tiny_config, tiny_setup, tiny_trainer

from newllm_lib import runs
from newllm_lib.cli import main
from newllm_lib.errors import TrainingError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.progress import Progress
from newllm_lib.studies.precision.compare import (
    around_the_first_skip,
    compare_runs,
    parting,
    smoothing_window,
    spread,
    trailing_means,
)
from newllm_lib.studies.precision.rounding import batch_ids, gradients, part_of, rounding_errors
from newllm_lib.studies.precision.step_log import StepLog, Weights, marks, read_steps, relative_distance
from newllm_lib.studies.precision.study import PrecisionStudy, available_formats, compare_precisions
from newllm_lib.system.hardware import Machine, Precision

pytestmark = pytest.mark.usefixtures("no_pictures")

NEW_CPU = Machine(device="cpu", name="New CPU", cpu_flags=frozenset({"avx512_bf16"}))
OLD_CPU = Machine(device="cpu", name="Old CPU")
T4 = Machine(device="cuda:0", name="Tesla T4", capability=(7, 5))
EXACT = Precision("fp32", "for the test")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Drawing takes longer than these runs; the study that the whole file looks at is drawn before this holds."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"no picture"))


# --- where two curves part --------------------------------------------------------------------------------------


def noise(seed: int, size: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, 0.1, size)


def falling(size: int = 400) -> np.ndarray:
    return 3.0 + 4.0 * np.exp(-np.arange(size) / 50)


def test_the_spread_is_that_of_the_noise_and_not_of_the_trend():
    assert spread(np.array([1.0, 2.0, 1.0, 2.0])) == pytest.approx(1.0483, abs=1e-4)  # 1 / (0.6745 sqrt 2)
    assert spread(falling() + noise(1)) == pytest.approx(0.1, rel=0.15)
    assert spread(np.array([1.0])) == 0


def test_means_reach_back():
    assert trailing_means(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.5, 2.5, 3.5]
    assert trailing_means(np.array([1.0]), 2).tolist() == []
    assert [smoothing_window(steps) for steps in (12, 120, 390)] == [5, 6, 20]


def test_the_band_is_four_standard_errors():
    losses = np.array([1.0, 2.0] * 20)
    assert parting(losses, losses, 8) == (None, pytest.approx(2.0966, abs=1e-4))  # 4 x sqrt(2 / 8) x 1.0483


def test_equal_curves_never_part():
    for losses in (np.zeros(50), falling(), falling() + noise(1)):
        assert parting(losses, losses.copy(), 10)[0] is None


def test_a_step_change_is_where_they_part():
    flat = np.full(100, 4.0)
    changed = flat.copy()
    changed[60:] += 1e-6  # without noise any difference counts
    assert parting(flat, changed, 10)[0] == 60
    first = falling() + noise(1)
    assert parting(first, first + 3.0 * (np.arange(400) >= 250), 20)[0] == 250
    slow = parting(first, first + 0.2 * (np.arange(400) >= 250), 20)[0]
    assert 250 < slow < 270  # a change of the size of the noise is seen within the window
    assert parting(first, first - 3.0 * (np.arange(400) >= 250), 20)[0] == 250


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_never_parts_them(seed):
    assert parting(falling() + noise(2 * seed), falling() + noise(2 * seed + 1), 20)[0] is None


def test_a_difference_that_does_not_stay_is_no_parting():
    flat = np.full(100, 4.0)
    bump, end = flat.copy(), flat.copy()
    bump[40:43] += 1.0  # 12 means of ten hold it
    end[95:] += 1.0
    assert parting(flat, bump, 10)[0] == 40
    assert parting(flat, np.where(np.arange(100) == 40, 5.0, 4.0), 11)[0] == 40
    assert parting(flat, end, 10)[0] is None  # five steps are too few to say
    assert parting(flat[:5], end[:5], 10)[0] is None


def rows_of(losses):
    return DataFrame(
        {"batch": range(1, len(losses) + 1), "loss": losses, "digest": "same", "skipped": 0, "distance": 0.25}
    )


def test_curves_that_meet_again_are_said_to():
    flat, bump, step = np.full(100, 4.0), np.full(100, 4.0), np.full(100, 4.0)
    bump[40:60] += 1.0
    step[40:] += 1.0
    rows = DataFrame({"step": [50, 100], "val_loss": [4.0, 4.0]})
    other = DataFrame({"step": [50, 100], "val_loss": [4.5, 3.9]})
    met, apart, same = (compare_runs(rows_of(flat), rows_of(found), rows, other, 10) for found in (bump, step, flat))
    assert (met["parted_at"], met["rejoined_at"]) == (41, 70)  # batches 60 to 69 are the last whose mean holds any
    assert (apart["parted_at"], apart["rejoined_at"]) == (41, None)
    assert (same["parted_at"], same["rejoined_at"]) == (None, None)
    assert (met["train_largest"], met["gap_first"], met["gap_last"]) == (1.0, 0.0, 0.0)
    assert (met["val_last"], met["val_mean"], met["distance"]) == (pytest.approx(-0.1), pytest.approx(0.3), 0.25)
    assert (met["batches"], met["same_batches"], met["validations"]) == (100, 100, 2)


def test_what_the_first_skipped_step_does_by_hand():
    both = DataFrame({"batch": range(1, 8), "skipped_other": [0, 0, 0, 1, 0, 1, 0]})
    sizes = np.array([1.0, 2.0, 3.0, 4.0, 50.0, 60.0, 70.0])
    found = around_the_first_skip(both, sizes, 2)
    assert found == {"first_skip": 4, "gap_before_skip": 3.5, "gap_after_skip": 55.0}
    assert around_the_first_skip(both.assign(skipped_other=0), sizes, 2)["first_skip"] is None
    assert around_the_first_skip(both[:4], sizes[:4], 2)["gap_after_skip"] is None


# --- which formats a machine has ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "asked", "emulate", "names"),
    [
        (T4, ("fp32", "fp16"), False, ["fp32", "fp16"]),
        (NEW_CPU, ("fp32", "fp16"), False, ["fp32", "bf16"]),
        (NEW_CPU, ("fp32", "bf16", "fp16"), False, ["fp32", "bf16"]),
        (NEW_CPU, ("fp32", "bf16", "fp16"), True, ["fp32", "bf16", "fp16"]),
        (OLD_CPU, ("fp32", "fp16"), False, ["fp32", "bf16"]),
        (OLD_CPU, ("fp16", "fp32"), True, ["fp16", "fp32"]),
    ],
)
def test_formats_are_those_that_run(machine, asked, emulate, names):
    assert [found.name for found in available_formats(asked, machine, emulate)] == names


def test_reasons_of_formats_say_what_they_are():
    assert available_formats(("fp32", "fp16"), NEW_CPU)[1].reason == (
        "fp16 is not native to New CPU; nearest is bf16: New CPU has avx512_bf16"
    )
    assert available_formats(("fp32", "fp16"), OLD_CPU)[1].reason == (
        "not native to Old CPU: emulated, its rounding is real, its speed is not"
    )
    with pytest.raises(ValueError, match="on Old CPU they all come down to bf16; compare with fp32, or"):
        available_formats(("bf16", "fp16"), OLD_CPU)


@pytest.mark.parametrize(
    ("formats", "changes", "message"),
    [
        (("fp32",), {}, r"precisions = \('fp32',\): must be two or more of fp32, bf16, fp16, each once"),
        (("fp32", "fp32"), {}, "each once"),
        ("fp32, fp8", {}, "must be two or more of fp32, bf16, fp16"),
        ("fp32,bf16", {"batch_policy": "fast"}, "batch_policy = 'fast': must be recipe here"),
        ("fp32,bf16", {"mirror_dir": "."}, "mirror_dir = '.': not for this study"),
    ],
)
def test_what_makes_no_comparison_is_refused(text, formats, changes, message):
    with pytest.raises(ValueError, match=message):
        compare_precisions(tiny_config(text, **changes), formats)


# --- one step at the same weights -----------------------------------------------------------------------------------


def fresh_model(setup):
    return NewLLM.fresh(setup.config.model, setup.config.train.seed)


@pytest.fixture(scope="module")
def dry(text):
    setup = tiny_setup(text, dropout=0.0)
    return setup, fresh_model(setup)


def test_gradients_are_those_of_the_mean_loss(dry):
    setup, model = dry
    ids = batch_ids(setup, 0)
    logits, _ = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    expected = torch.autograd.grad(loss, model.layers[0].weight)[0]
    found = gradients(setup, model, ids, EXACT)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    weight = found.groups["layer 2"][: expected.numel()].view_as(expected)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
    assert len(found.groups["all"]) == sum(parameter.numel() for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parts_have_the_names_that_a_reader_knows(dry):
    assert list(dict.fromkeys(part_of(name) for name, _ in dry[1].named_parameters())) == [
        "embedding", "layer 1", "layer 2", "context heads", "context norm", "output head",
    ]  # fmt: skip


def test_fp32_has_no_error(dry):
    rows = rounding_errors(*dry, Precision("fp32", "for the test"))
    assert {(row["loss_error"], row["gradient_error"]) for row in rows} == {(0.0, 0.0)}


def test_16_bits_have_a_small_error_and_fp16_less_than_bf16(text):
    """By the median of five models: a ReLU that flips can outweigh all rounding in one of them."""
    errors = {"bf16": [], "fp16": []}
    for seed in range(5):
        setup = tiny_setup(text, dropout=0.0, seed=seed)
        model = fresh_model(setup)
        for name, found in errors.items():
            row = rounding_errors(setup, model, Precision(name, "for the test"))[0]
            assert row["part"] == "all"
            assert row["other_batch"] > 3 * row["gradient_error"]
            found.append(row["gradient_error"])
    bf16, fp16 = (float(np.median(found)) for found in errors.values())
    assert 1e-3 < bf16 < 0.05
    assert 1e-5 < fp16 < bf16 / 2  # three bits more


def test_the_dropout_masks_are_the_same_in_every_format(text):
    setup = tiny_setup(text, dropout=0.5)
    row = rounding_errors(setup, fresh_model(setup), Precision("bf16", "for the test"))[0]
    assert row["gradient_error"] < 0.05  # other masks would change all of it
    assert row["loss_error"] < 1e-3


class Disturbs(Progress):
    """Calls a function when a step ends for the n-th time, over all runs."""

    def __init__(self, at: int, call):
        self._left, self._call = at, call

    def step(self, *_):
        self._left -= 1
        if self._left == 0:
            self._call()


# --- what is recorded of every step ---------------------------------------------------------------------------------


def test_weights_are_measured_at_round_steps():
    assert marks(120) == [1, 2, 5, 10, 20, 50, 100, 120]
    assert marks(50) == [1, 2, 5, 10, 20, 50]
    assert marks(1) == [1]


def test_distances_by_hand(tmp_path):
    first, other = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, {}
    other = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.0])}
    assert relative_distance(first, first) == 0
    assert relative_distance(other, first) == 1.0  # sqrt(9 + 16) / sqrt(9 + 16)
    assert relative_distance(first, other) == pytest.approx(5 / math.sqrt(18))


def test_weights_are_kept_until_they_are_removed(dry, tmp_path):
    setup, model = dry
    weights, beginning = Weights(tmp_path / "weights"), fresh_model(setup)
    assert weights.measure(beginning, model, 5, first=True) == (0, 0)
    with torch.no_grad():
        moved = fresh_model(setup)
        moved.output.bias += 1.0
    assert weights.measure(beginning, moved, 5, first=False)[1] > 0
    assert math.isnan(weights.measure(beginning, moved, 6, first=False)[1])
    weights.remove()
    assert not (tmp_path / "weights").exists()


def test_a_torn_last_line_is_left_out_and_a_repeated_batch_counts_once(tmp_path):
    path = tmp_path / "steps.csv"
    assert len(read_steps(path)) == 0
    head = "batch,step,loss,grad_norm,loss_scale,skipped,digest,moved,distance\n"
    rows = "1,1,5.0,1.0,,0,aa,,\n2,2,4.0,1.0,,0,bb,,\n2,2,4.5,1.0,,0,bb,,\n"
    path.write_text(head + rows + "3,3,3.9,1.", encoding="utf-8")
    assert read_steps(path)[["batch", "loss"]].to_numpy().tolist() == [[1, 5.0], [2, 4.5]]


def test_the_log_holds_the_very_batches_and_losses(text, tmp_path):
    log = StepLog(tmp_path / "results" / "one" / "steps.csv", lambda model, batch: (0.5, 0.25))
    config = tiny_config(text, max_steps=6, name="one", results_dir=str(tmp_path / "results"))
    with log.open():
        run = runs.train(config, progress=Progress(), watch=log.watch)
    steps = read_steps(run.folder / "steps.csv")
    ids = batch_ids(tiny_setup(text), 1)
    assert steps["digest"][1] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    assert steps["digest"].nunique() == 6
    assert steps["batch"].tolist() == steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["distance"].notna().tolist() == [True, True, False, False, True, True]
    assert steps["loss_scale"].isna().all()
    row = run.history.iloc[0]  # at step 3: the mean over the tokens of three batches
    assert steps["loss"][:3].mean() == pytest.approx(row["train_loss"], rel=0.02)


def test_a_run_that_goes_on_drops_the_lines_after_its_checkpoint(text, tmp_path):
    config = tiny_config(text, max_steps=8, name="one", results_dir=str(tmp_path))
    path = tmp_path / "one" / "steps.csv"

    def train_until(step):
        log = StepLog(path, lambda model, batch: (0.0, 0.0))
        with log.open():
            runs.train(config, progress=Disturbs(step, lambda: signal.raise_signal(signal.SIGINT)), watch=log.watch)
        return read_steps(path)

    assert train_until(6)["batch"].tolist() == [1, 2, 3, 4, 5, 6]
    with path.open(
        "a", encoding="utf-8"
    ) as file:  # as if a killed process had come further, the last line half written
        file.write("7,7,99.0,1.0,,0,x,,\n8,8,99.0,1.0,,0,x,,\n9,9,99")
    after = train_until(1)
    assert after["batch"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert after["loss"].max() < 10


def torn_update(number):
    """An optimizer's step after which, in one call, memory runs out: the weights may be half changed then."""

    def failing(step):
        calls = iter(range(10_000))

        def run(*args, **kwargs):
            step(*args, **kwargs)
            if next(calls) == number:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    return failing


@pytest.mark.parametrize("number", [0, 7], ids=["to the beginning", "to a checkpoint"])
def test_a_run_that_goes_back_records_each_batch_once_and_in_order(text, tmp_path, number):
    """Memory runs out while the weights change, at step 1 or 8, and the newest checkpoint is that of step 6 or none."""
    path, seen = tmp_path / "steps.csv", []
    trainer = tiny_trainer(tiny_setup(text, max_steps=12, epochs=None), tmp_path / "checkpoints")
    optimizer = trainer.optimizers[0]
    optimizer.step = torn_update(number)(optimizer.step)
    log = StepLog(path, lambda model, batch: (float(len(seen)), 0.0))
    with log.open():
        log.watch(trainer)
        trainer.on_step = lambda result: seen.append(trainer.state.step)
        assert trainer.fit() == "finished"
    repeated = {0: [], 7: [7]}[number]
    assert seen == [*range(1, number + 1), *range(number + 1 - len(repeated), 13)]
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["batch", *map(str, range(1, 13))]


@pytest.mark.slow
def test_a_run_that_goes_back_and_ends_there_keeps_no_line_of_what_it_undid(text, tmp_path):
    """Memory runs out in the update of step 8, and then in every step: the run is at step 6, and so is its log."""
    path = tmp_path / "steps.csv"
    trainer = tiny_trainer(tiny_setup(text, max_steps=12, epochs=None), tmp_path / "checkpoints")
    optimizer, read = trainer.optimizers[0], trainer._batches.read
    optimizer.step = torn_update(7)(optimizer.step)
    calls = iter(range(10_000))

    def failing(*args):
        if next(calls) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(*args)

    trainer._batches.read = failing
    log = StepLog(path, lambda model, batch: (0.0, 0.0))
    with log.open(), pytest.raises(TrainingError, match="with one sequence at a time"):
        log.watch(trainer)
        trainer.fit()
    assert trainer.state.step == 6
    assert read_steps(path)["batch"].tolist() == [1, 2, 3, 4, 5, 6]


# --- whole studies --------------------------------------------------------------------------------------------------


def study_of(text, folder, progress=None, report=lambda line: None, control_seed=True, **changes):
    config = tiny_config(text, max_steps=30, epochs=None, validate_every_steps=10, results_dir=str(folder), **changes)
    return compare_precisions(
        config, "fp32,bf16", control_seed=control_seed, progress=progress or Progress(), report=report
    )


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return study_of(text, tmp_path_factory.mktemp("whole"))


def test_formats_read_the_same_batches_and_another_seed_reads_others(whole):
    same, other = whole.record["comparisons"]
    assert (same["label"], same["same_batches"], same["batches"]) == ("bf16", 30, 30)
    assert (other["label"], other["same_batches"], other["batches"]) == ("fp32-seed-43", 0, 30)
    steps = {label: rows.set_index("batch") for label, rows in whole.steps.groupby("label")}
    assert (steps["fp32"]["digest"] == steps["bf16"]["digest"]).all()
    assert not (steps["fp32"]["digest"] == steps["fp32-seed-43"]["digest"]).any()


def test_distances_between_runs_are_of_the_right_size(whole):
    steps = {label: rows.set_index("batch") for label, rows in whole.steps.groupby("label")}
    assert (steps["fp32"]["distance"].dropna() == 0).all()
    assert 0 < steps["bf16"]["distance"][1] < 0.01
    assert steps["bf16"]["distance"][1] < steps["bf16"]["distance"][30] < 0.1
    assert steps["fp32-seed-43"]["distance"][1] == pytest.approx(math.sqrt(2), rel=0.1)  # two random draws
    assert steps["fp32"]["moved"].dropna().is_monotonic_increasing


def test_the_first_losses_differ_by_rounding_alone(whole):
    same, other = whole.record["comparisons"]
    assert 0 < same["gap_first"] < 1e-3
    assert other["gap_first"] > 5 * same["gap_first"]  # 9 where a CPU emulates BF16
    assert same["parted_at"] is None
    assert same["val_mean"] < other["val_mean"]
    assert any("is below that between two seeds" in sentence for sentence in whole.findings)
    assert whole.findings[1].startswith("bf16 and fp32 read the same 30 batches (compared by hash)")


def test_what_it_leaves_and_that_it_can_be_read_back(whole, tmp_path):
    names = {path.name for path in whole.folder.iterdir() if path.suffix != ".lock"}
    assert names == {
        "settings.json", "study.json", "steps.csv", "validations.csv", "precisions.md", "precisions.png", "fp32",
        "bf16", "fp32-seed-43",
    }  # fmt: skip
    assert (whole.folder / "precisions.png").read_bytes().startswith(b"\x89PNG")
    again = PrecisionStudy.read(whole.folder)
    assert again.record == whole.record
    assert again.steps.equals(PrecisionStudy.read(again.write(tmp_path / "copy")).steps)
    report = (whole.folder / "precisions.md").read_text(encoding="utf-8")
    assert all(f"- {sentence}\n" in report for sentence in whole.findings)
    assert "| bf16 | trained | layer 2 |" in report
    assert whole.table["run"].tolist() == ["fp32", "bf16", "fp32-seed-43"]
    assert set(whole.rounding["weights"]) == {"untrained", "trained"}


def test_a_finished_study_is_read_and_other_settings_make_another(whole, text, tmp_path):
    told, before = [], (whole.folder / "study.json").stat().st_mtime_ns
    again = study_of(text, whole.folder.parent, report=told.append)
    assert told == [f"this study is finished: {whole.folder}"]
    assert (again.record, (again.folder / "study.json").stat().st_mtime_ns) == (whole.record, before)
    for kept, differs in ((True, r": dropout 0\.2 there, 0\.1 here"), (False, "")):
        if not kept:  # as a study of before they were
            (whole.folder / "settings.json").rename(tmp_path / "settings.json")
        with pytest.raises(
            ValueError, match=rf"holds a study with other settings{differs}\. Give this one another name"
        ):
            study_of(text, whole.folder.parent, name=whole.folder.name, dropout=0.1)
    assert study_of(text, whole.folder.parent).record == whole.record
    shutil.move(tmp_path / "settings.json", whole.folder)


class Counts(Progress):
    """Counts the steps of all runs."""

    steps = 0

    def step(self, *_):
        self.steps += 1


def crash():
    raise RuntimeError("the machine is gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error", "at"),
    [(lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, 14), (crash, RuntimeError, 44)],
    ids=["stopped in the first run", "crashed in the second"],
)
def test_an_interrupted_study_goes_on_and_equals_one_that_was_not(whole, text, tmp_path, call, error, at):
    with pytest.raises(error):
        study_of(text, tmp_path, progress=Disturbs(at, call), control_seed=False)
    assert not list(tmp_path.glob("*/study.json"))
    record = next(tmp_path.glob("*/fp32/run.json"))
    before, counter = record.stat().st_mtime_ns, Counts()
    with pytest.raises(ValueError, match="holds a study with other settings: control_seed False there, True here"):
        study_of(text, tmp_path, name=record.parent.parent.name)
    study = study_of(text, tmp_path, progress=counter, control_seed=False)
    assert study.steps.equals(whole.steps[whole.steps["label"] != "fp32-seed-43"])
    assert study.record["comparisons"] == whole.record["comparisons"][:1]
    assert not list(tmp_path.glob("*/weights"))
    if at == 14:
        assert counter.steps == 16 + 30
    else:  # the first run had ended; the second goes on from its validation at step 10
        assert counter.steps == 20
        assert record.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_that_was_trained_for_longer_is_refused(text, tmp_path):
    """Before the others are trained; its curve would come from another plan than theirs."""
    with pytest.raises(RuntimeError):
        study_of(text, tmp_path, progress=Disturbs(31, crash))
    second = runs.load(next(tmp_path.glob("*/bf16")))
    runs.train(second.requested.replace(max_steps=33), progress=Progress())
    shutil.rmtree(second.folder.parent / "fp32")
    counter = Counts()
    with pytest.raises(
        ValueError, match="bf16: has trained 33 steps, and this study plans 30: it was continued on its"
    ):
        study_of(text, tmp_path, progress=counter)
    assert counter.steps == 0


@pytest.mark.slow
def test_fp16_records_its_loss_scale(text, tmp_path):
    config = tiny_config(text, max_steps=4, epochs=None, results_dir=str(tmp_path), emulate_precision=True)
    study = compare_precisions(
        config, ("fp32", "fp16"), control_seed=False, progress=Progress(), report=lambda line: None
    )
    assert [run["precision"] for run in study.record["runs"]] == ["fp32", "fp16"]
    rows = study.steps[study.steps["label"] == "fp16"]
    skipped = int(rows["skipped"].sum())
    assert rows["loss_scale"].iloc[-1] == 65536.0 / 2**skipped
    assert rows["step"].iloc[-1] == 4
    assert len(rows) == 4 + skipped
    assert any(sentence.startswith(f"fp16: {skipped} of {len(rows)} steps were skipped") for sentence in study.findings)


def test_a_run_that_breaks_down_is_a_result(text, tmp_path):
    study = study_of(text, tmp_path, control_seed=False, lr=100.0, optimizer="adamw", weight_decay=10.0)
    broken = [run["label"] for run in study.record["runs"] if run["failure"]]
    assert broken == ["fp32", "bf16"]
    assert any(sentence.startswith("fp32 broke down: the ") for sentence in study.findings)
    assert (study.folder / "precisions.png").exists()


def test_the_command(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = SHAPE | RECIPE | {"init_std": "none", "data": text, "max_steps": 4}
    options = [part for key, value in values.items() for part in ("--" + key.replace("_", "-"), str(value))]
    at = options.index("--precision")
    call = [
        "precisions",
        "quickstart",
        *options[:at],
        *options[at + 2 :],
        "--formats",
        "fp32,bf16",
        "--no-control-seed",
    ]
    result = CliRunner().invoke(main, [*call, "--json"])
    assert result.exit_code == 0, result.output
    assert [run["label"] for run in json.loads(result.stdout)["runs"]] == ["fp32", "bf16"]
    assert "run 2 of 2: bf16" in result.stderr
    again = CliRunner().invoke(main, call)
    assert again.stdout.startswith("- fp32 and bf16 on ")
    assert "written to results/precisions-" in again.stderr
    refused = CliRunner().invoke(main, ["precisions", "--precision", "bf16"])
    assert refused.exit_code == 2
    assert "name them with --formats" in refused.stderr
