"""What is decided before a run starts, kept when it goes on, and said about its faithfulness."""

import math

import pytest
import torch
from tiny import Quiet, tiny_config, tiny_setup, tiny_trainer, write_text

import newllm_lib as nl
from newllm_lib.config import presets
from newllm_lib.reporting.record import RunRecord
from newllm_lib.runs import recorder
from newllm_lib.runs.recorder import Recorder
from newllm_lib.system.hardware import Machine, Precision
from newllm_lib.training import setup as setups
from newllm_lib.training.checkpoint import load_checkpoint, save_checkpoint
from newllm_lib.training.plan import plan_lines, unfaithful_reason
from newllm_lib.training.setup import make_setup

# --- the batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "changes", "batch_size"),
    [
        ("builtin", {}, 128),
        (None, {}, 62),  # all the training sequences that there are
        (None, {"layout": "stream", "sequence_length": 24}, 27),  # 622 targets in lanes of 23 and more
    ],
    ids=["by the machine", "all windows", "full lanes"],
)
def test_a_batch_left_open_is_the_machines_as_far_as_the_data_go(text, data, changes, batch_size):
    open_config = tiny_config(data or text, batch_size=None, **changes)
    setup = make_setup(open_config)
    assert setup.config.train.batch_size == batch_size
    kept = make_setup(open_config, {"batch_size": 16})
    assert kept.config.train.batch_size == 16
    assert kept.identity == setup.identity


# --- a text that was read before ----------------------------------------------------------------------------------


def test_a_text_read_before_serves_another_run_of_it(text):
    earlier = make_setup(tiny_config(text, vocab_size=40))
    other = tiny_config(text, vocab_size=40, batch_size=4, lr=1e-2, dropout=0.0, sequence_length=9, name="other")
    again = make_setup(other, prepared=earlier.prepared)
    assert (again.config.train.batch_size, again.rate.value, again.config.model.dropout) == (4, 1e-2, 0.0)
    assert (again.train_split.ids.shape[1], again.config.name, again.config.model.vocab_size) == (9, "other", 34)
    assert again.identity == make_setup(other).identity != earlier.identity


@pytest.mark.parametrize("changes", [{"vocab_size": 20}, {"data": "builtin"}, {"text_unit": "file"}], ids=str)
def test_a_text_read_otherwise_is_not_taken_for_this_one(text, changes):
    earlier = make_setup(tiny_config(text, vocab_size=40))
    with pytest.raises(AssertionError, match="another text or tokenizer"):
        make_setup(tiny_config(text, vocab_size=40).replace(**changes), prepared=earlier.prepared)


# --- what the text is warned of --------------------------------------------------------------------------------------


def test_a_stride_that_leaves_gaps_is_told_with_the_share_that_is_used(text):
    shown = {}
    for stride in (7, 8):
        setup = make_setup(tiny_config(text, sequence_length=8, stride=stride))
        shown[stride] = dict(plan_lines(setup, "run")).get("warning")
    assert shown[7].endswith("so the scores are better than on new text")  # it leaves no gap
    texts = [line.split() for line in (text / "train.txt").read_text().splitlines()]
    targets = sum(len(words) + 1 for words in texts)
    used = sum(min(len(words) + 1, 7 * (max(0, len(words) + 2 - 8) // 8 + 1)) for words in texts)
    assert shown[8].removeprefix(shown[7]) == (
        f"; stride 8 with sequence_length 8 trains on {used / targets:.1%} of the tokens: the rest lies between two "
        "windows; a stride up to 7 leaves no gap"
    )
    assert make_setup(tiny_config(text, sequence_length=8, stride=8, layout="stream")).prepared.warnings == (shown[7],)


# --- the precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "requested", "decided", "expected"),
    [
        ({"avx512_bf16"}, "auto", "bf16", Precision("bf16", "as this run began")),
        ({"avx512_bf16"}, "auto", "fp32", Precision("fp32", "as this run began")),
        ({"avx512_bf16"}, "bf16", "bf16", Precision("bf16", "as this run began")),
        (
            set(),
            "auto",
            "bf16",
            Precision(
                "fp32",
                "bf16 is not native to Some CPU; nearest is fp32: Some CPU has neither avx512_bf16 nor amx_bf16",
                substituted=True,
            ),
        ),
    ],
)
def test_a_run_goes_on_in_the_precision_that_it_began_with(text, monkeypatch, flags, requested, decided, expected):
    monkeypatch.setattr(
        setups, "detect", lambda *_args: Machine(device="cpu", name="Some CPU", cpu_flags=frozenset(flags))
    )
    assert make_setup(tiny_config(text, precision=requested), {"precision": decided}).precision == expected


@pytest.mark.parametrize(("requested", "decided"), [("fp16", "bf16"), ("bf16", "fp32")])
def test_a_precision_other_than_the_requested_stays_a_substitute(text, monkeypatch, requested, decided):
    machine = Machine(device="cpu", name="Some CPU", cpu_flags=frozenset({"avx512_bf16"}))
    monkeypatch.setattr(setups, "detect", lambda *_args: machine)
    precision = make_setup(tiny_config(text, precision=requested), {"precision": decided}).precision
    assert (precision.name, precision.substituted) == (decided, True)


# --- faithful or not --------------------------------------------------------------------------------------------


def test_a_faithful_preset_with_other_settings_is_not_faithful_and_names_them(text):
    changed = {"lr": 1e-3, "hidden_dim": 64, "batch_size": 16, "seed": 7}  # any seed is faithful
    setup = make_setup(presets.get("cpu_baseline").replace(data=text, **changed))
    assert unfaithful_reason(setup) == (
        "vocab_size is 34, not 1000; hidden_dim is 64, not 512; batch_size is 16, not 32; lr is 0.001, not None; "
        "the validation data are not those of the published protocol"
    )


def test_the_cpu_baseline_on_its_own_data_is_faithful(wikitext):
    setup = make_setup(presets.get("cpu_baseline").replace(data=wikitext))
    assert unfaithful_reason(setup) is None
    assert unfaithful_reason(make_setup(presets.get("cpu_baseline").replace(data=wikitext, dropout=0.2))) == (
        "dropout is 0.2, not 0.1"
    )


@pytest.mark.parametrize("name", ["t4_fp16", "a100_fp16"])
def test_fp16_presets_are_not_faithful_on_a_cpu(tmp_path, name):
    data = write_text(tmp_path, texts=4200)  # enough for a batch
    reason = unfaithful_reason(make_setup(presets.get(name).replace(data=data, device="cpu")))
    vocabulary, precision, *_, protocol = reason.split("; ")
    assert vocabulary == "vocab_size is 34, not 1000"
    assert precision.startswith("fp16 is not native to ")
    assert protocol == "the validation data are not those of the published protocol"


def test_a_run_is_not_faithful_once_a_part_of_it_was_not(text, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "unfaithful_reason", lambda setup: None)
    trainer = tiny_trainer(tiny_setup(text, preset="cpu_baseline"), tmp_path)
    for earlier, expected in (
        (RunRecord(), (True, None)),
        (RunRecord(faithful=True, faithful_reason=None), (True, None)),
        (RunRecord(faithful=False, faithful_reason="fp16 is not native"), (False, "fp16 is not native")),
    ):
        record = Recorder(trainer, tmp_path, earlier).record
        assert (record["faithful"], record["faithful_reason"]) == expected


# --- the warm-up ------------------------------------------------------------------------------------------------

SHORT = {"lr_schedule": "cosine", "warmup_steps": 30, "epochs": None, "max_steps": 20, "validate_every_steps": 5}


def rate_line(setup):
    return dict(plan_lines(setup, "run"))["learning rate"]


def test_the_plan_says_how_long_the_warm_up_is(text):
    assert rate_line(make_setup(tiny_config(text, **SHORT))).endswith(
        "; cosine to 0 at step 20, warm-up 2 steps (a tenth of the decay, less than the 30 of warmup_steps)"
    )
    longer = make_setup(tiny_config(text, **SHORT | {"max_steps": 400}))
    assert rate_line(longer).endswith("; cosine to 0 at step 400, warm-up 30 steps")
    constant = make_setup(tiny_config(text, **SHORT | {"lr_schedule": "constant"}))
    assert rate_line(constant).endswith("; constant, warm-up 30 steps")


@pytest.mark.slow
def test_a_run_that_is_extended_keeps_the_warm_up_of_its_first_step(text, tmp_path):
    """20 steps, then 60: interrupted at 30 or not, the same bits; the rate of each step by hand."""
    results = []
    for name, parts in (("whole", (60,)), ("parts", (30, 60))):
        config = tiny_config(text, results_dir=str(tmp_path / name), name="r", **SHORT)
        begun = nl.train(config, progress=Quiet())
        assert (begun.record.warmup_steps, begun.record.step) == (2, 20)
        rates = [3e-3 * _cosine(step - 1, 2, 20) for step in begun.history["step"]]
        assert list(begun.history["lr"]) == pytest.approx(rates)
        for steps in parts:
            run = nl.train(config, max_steps=steps, decay_steps=60, progress=Quiet())
        assert (run.record.warmup_steps, run.record.step) == (2, 60)
        expected = "; cosine to 0 at step 60, warm-up 2 steps (as the run began, not the 30 of warmup_steps)"
        assert dict(run.record.plan)["learning rate"].endswith(expected)
        lines = dict(nl.plan(config, max_steps=60, decay_steps=60)[1])
        assert lines["learning rate"].endswith(expected)
        later = run.history[run.history["step"] > 20]
        assert list(later["lr"]) == pytest.approx([3e-3 * _cosine(step - 1, 2, 60) for step in later["step"]])
        results.append(run.model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_run_of_an_earlier_version_keeps_its_full_warm_up(text, tmp_path):
    config = tiny_config(text, results_dir=str(tmp_path), name="r", **SHORT)
    run = nl.train(config, max_steps=20, progress=Quiet())
    for path in (run.folder / "checkpoints").glob("*.pt"):
        payload = load_checkpoint(path, pytest.fail)
        assert payload.pop("warmup_steps") == 2 and "warmup_steps" not in payload["state"]  # which earlier ones refuse
        save_checkpoint(path, payload, payload["state"]["step"])
    again = nl.train(config, max_steps=40, decay_steps=60, progress=Quiet())
    assert again.record.warmup_steps == 30
    assert dict(again.record.plan)["learning rate"].endswith("cosine to 0 at step 60, warm-up 30 steps")
    later = again.history[again.history["step"] > 20]
    assert list(later["lr"]) == pytest.approx([3e-3 * _cosine(step - 1, 30, 60) for step in later["step"]])


def _cosine(step, warmup, end):
    """The formula of the field, written down once more."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))
