"""The batch that a search finds: it was really run, it fits, nothing else in the process has changed."""

import ctypes
import dataclasses
import gc
import itertools
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import same, tiny_config, tiny_setup, tiny_trainer, write_text

import newllm_lib as nl
from newllm_lib.model.recurrence import fused
from newllm_lib.model.recurrence.self_check import EngineChoice
from newllm_lib.system import memory as memory_room
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.memory import OUT_OF_MEMORY as WORDINGS
from newllm_lib.system.memory import ProcessMemory
from newllm_lib.training.estimates import memory_estimate_bytes
from newllm_lib.training.rng import generator_states
from newllm_lib.training.setup import with_batch
from newllm_lib.tuning import batch_finder, trial
from newllm_lib.tuning.batch_finder import fastest_small, find_batch, has_stalled, largest_that_ran, search_batch
from newllm_lib.tuning.cache import Store
from newllm_lib.tuning.trial import ABOVE_LIMIT, OUT_OF_MEMORY, RAN, Try, expected_seconds, run_try

MIB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    monkeypatch.setattr(trial, "_STEPS", 1)
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """A search collects garbage after each try: not through all that the test process has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), texts=200)


class Device:
    """A stand-in for a GPU: a sequence takes a MiB, and beyond `room` of them an allocation fails in given words."""

    def __init__(self, room=10**9, error=None, usable=10**6, overcommits=False):
        self.room, self.usable_bytes, self.overcommits = room, usable * MIB, overcommits
        self.error = error or RuntimeError("CUDA error: out of memory")
        self.most, self.refs, self.alive, self.trained = 0, [], [], []

    def setup(self, setup):
        return dataclasses.replace(setup, engine=EngineChoice("fused", self.run, "of the stand-in"))

    def run(self, weights, tokens, *rest):
        self.most = max(self.most, len(tokens))
        if torch.is_grad_enabled():
            self.trained.append(len(tokens))
        if len(tokens) > self.room:
            block = torch.ones(len(tokens), 1000)
            self.refs.append(weakref.ref(block))
            raise type(self.error)(*self.error.args)
        return fused.recurrence(weights, tokens, *rest)

    def start(self):
        self.alive += [ref() is not None for ref in self.refs]  # of the tries before this one
        self.most = 0

    def peak_bytes(self):
        return self.most * MIB

    def clear(self):
        gc.collect()


def found(setup, policy, device=None, **options):
    device = device or Device()
    lines = []
    choice = search_batch(device.setup(setup), policy, report=lines.append, memory=device, **options)
    assert len(lines) == len(choice.tries)
    assert [t for t in choice.tries if (t.batch_size, t.micro_batch_size, t.outcome) == (
        choice.batch_size, choice.micro_batch_size, RAN)]  # fmt: skip
    assert choice.peak_bytes <= choice.memory_share * choice.usable_bytes
    return choice


def sizes(choice):
    return [one.batch_size for one in choice.tries]


# --- fill -------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_leads_to_a_smaller_size(text):
    device = Device(room=100)
    choice = found(tiny_setup(text), "fill", device)
    assert sizes(choice) == [8, 16, 32, 64, 128, 96, 112, 104]
    assert [one.outcome for one in choice.tries] == [RAN] * 4 + [OUT_OF_MEMORY, RAN, OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert (choice.batch_size, choice.ended_by) == (96, "memory")
    assert choice.tries[4].line() == "batch 128: out of memory (CUDA error: out of memory)"
    assert device.alive == [False] * 4  # of the 128 when 96, 112 and 104 began, of the 112 when 104 did


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), MemoryError(),
     OSError(12, "Cannot allocate memory"), *(RuntimeError(f"It failed: {words.upper()}!") for words in WORDINGS)],
    ids=repr,
)  # fmt: skip
def test_in_any_wording(text, error):
    choice = found(tiny_setup(text, eval_batch_size=8), "fill", Device(room=8, error=error))
    assert [(one.batch_size, one.outcome) for one in choice.tries] == [(8, RAN), (16, OUT_OF_MEMORY)]
    assert choice.tries[1].reason in (str(error), "MemoryError")


def test_the_smallest_size_may_be_too_large(text):
    assert sizes(found(tiny_setup(text, eval_batch_size=2), "fill", Device(room=3))) == [8, 4, 2]
    with pytest.raises(ValueError, match=r"not even one sequence at a time fits 90% of the .* GiB that can be used"):
        found(tiny_setup(text, eval_batch_size=1), "fill", Device(room=0))


def test_a_warm_up_that_memory_ends_leaves_nothing_behind(text):
    device = Device(room=3)
    assert sizes(found(tiny_setup(text, eval_batch_size=2), "fill", device)) == [8, 4, 2]
    assert device.alive == [False] * (1 + 2 + 3)  # of the warm-up, and of each try, when the next one began


def test_an_evaluation_that_does_not_fit_is_told(text):
    with pytest.raises(ValueError, match=r"in the evaluation of 10 sequences at once: .* smaller eval_batch_size may"):
        found(tiny_setup(text, eval_batch_size=10), "fill", Device(room=9))


@pytest.mark.parametrize("room", [0, 9])
def test_other_errors_are_not_taken_for_it(text, room):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        found(tiny_setup(text), "fill", Device(room=room, error=RuntimeError("shapes cannot be multiplied")))


@pytest.mark.parametrize(
    ("share", "usable", "batch_size"), [(0.9, 30, 24), (0.5, 200, 96), (0.23, 300, 64), (0.92, 60, 48)]
)
def test_fill_takes_the_share_that_it_may(text_setup, monkeypatch, share, usable, batch_size):
    synthetic(monkeypatch, lambda size: 100.0 * size, lambda size: size * MIB, usable * MIB)
    device = Device(usable=usable)
    choice = found(text_setup, "fill", device, memory_share=share)
    assert choice.batch_size == batch_size
    assert choice.peak_share == pytest.approx(batch_size / usable)
    assert 0.8 * share < choice.peak_share <= share
    assert [one.outcome for one in choice.tries].count(ABOVE_LIMIT) >= 1


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_share_that_cannot_be_is_refused(text, share):
    with pytest.raises(ValueError, match=r"memory_share = .*: must be a number above 0 to 1"):
        found(tiny_setup(text), "fill", memory_share=share)


def test_pieces_and_a_batch_to_be_found_do_not_go_together(text):
    with pytest.raises(ValueError, match=r"micro_batch_size = 4: must be none with batch_policy fill"):
        found(tiny_setup(text, micro_batch_size=4), "fill")


def test_the_data_end_the_search(text):
    choice = found(tiny_setup(text), "fill")
    assert sizes(choice) == [8, 16, 32, 64, 128, 256, 339]
    assert (choice.batch_size, choice.ended_by) == (339, "data")
    assert "all that the data have" in choice.reason


def test_lanes_of_a_stream_end_with_the_data_too(text):
    targets = sum(len(line.split()) + 1 for line in (text / "train.txt").read_text().splitlines())  # words and ends
    cap = targets // 23
    assert 128 < cap < 256
    choice = found(tiny_setup(text, layout="stream", sequence_length=24), "fill")
    assert sizes(choice) == [8, 16, 32, 64, 128, cap]


def test_the_time_ends_the_search_and_that_is_said(text):
    choice = found(tiny_setup(text), "fill", seconds=0.0)
    assert (sizes(choice), choice.ended_by) == ([8], "time")
    assert choice.reason.endswith("tried up to 8: the 0 s for the search, not the memory, ended it")


@pytest.mark.parametrize(
    ("step", "full", "seconds", "batch_size", "expected"),
    [
        # 0.2 + 5 steps of 0.1 of the 1.2 s are steps; then 0.4 + 3 of 0.2, or 0.3 + 4 of 0.15
        (0.1, 0.2, 1.2, 16, 0.5 + 1.0),
        (0.1, 0.2, 1.2, 12, 0.5 + 0.9),
        (0.1, 0.2, 0.6, 16, 1.0),  # unevenly timed
        # 3 + 3 steps of 2 of the 11 s are steps; then 6 + 2 of 4, or 12 + one of 8, which is long enough
        (2.0, 3.0, 11.0, 16, 2.0 + 14.0),
        (2.0, 3.0, 11.0, 32, 2.0 + 20.0),
    ],
)
def test_how_long_a_larger_try_will_take(monkeypatch, step, full, seconds, batch_size, expected):
    monkeypatch.setattr(trial, "_SECONDS", 0.5)
    monkeypatch.setattr(trial, "_STEPS", 3)
    facts = {"step_seconds": step, "full_seconds": full, "seconds": seconds, "outcome": RAN}
    assert expected_seconds(Try(batch_size=8, micro_batch_size=None, **facts), batch_size) == pytest.approx(expected)


def test_what_a_process_pays_once_is_not_taken_for_the_first_try(text, monkeypatch):
    """On a stand-in clock: an engine that is compiled for a second, then takes 50 ms for a step and 1 ms for a row."""
    clock = SimpleNamespace(now=0.0, compiled=False)

    class Timed(Device):
        def run(self, weights, tokens, *rest):
            clock.now += 0 if clock.compiled else 1
            clock.now += 0.05 + 0.001 * len(tokens) if torch.is_grad_enabled() else 0.2
            clock.compiled = True
            return super().run(weights, tokens, *rest)

    stand_in = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    for room in (trial, batch_finder):
        monkeypatch.setattr(room, "time", stand_in)
    monkeypatch.setattr(trial, "_SECONDS", 0.5)
    monkeypatch.setattr(trial, "_STEPS", 3)
    choice = found(tiny_setup(text, eval_batch_size=100), "fill", Timed(), seconds=5.0)
    # each: 8 rows, full rows and an evaluation: 0.258 s and a step; then 9, 8, 7 and 5 steps
    taken = [0.258 + 10 * 0.058, 0.258 + 9 * 0.066, 0.258 + 8 * 0.082, 0.258 + 6 * 0.114]
    assert [one.seconds for one in choice.tries] == pytest.approx(taken)
    assert [one.step_seconds for one in choice.tries] == pytest.approx([0.058, 0.066, 0.082, 0.114])
    assert (sizes(choice), choice.ended_by) == ([8, 16, 32, 64], "time")  # 128 would take until 5.77
    assert clock.now == pytest.approx(1.058 + sum(taken)) == pytest.approx(4.604)


def test_a_system_that_kills_is_never_asked_for_more_than_the_limit(text):
    device = Device(usable=150, room=135, overcommits=True)  # 135 MiB are allowed; beyond that the process would end
    choice = found(tiny_setup(text), "fill", device)
    assert (sizes(choice), choice.batch_size) == ([8, 16, 32, 64, 128, 256, 192, 160, 144, 136], 128)
    assert max(device.trained) == 128
    assert [one.outcome for one in choice.tries[-5:]] == [ABOVE_LIMIT] * 5
    assert choice.tries[5].reason == "not run: about 0.2 GiB expected, 0.1 allowed"


def test_the_first_size_is_expected_from_the_shapes(text):
    setup = tiny_setup(text)
    needed = memory_estimate_bytes(with_batch(setup, 1)) // MIB
    with pytest.raises(ValueError, match=r"not even one sequence at a time .*\(not run: about"):
        found(setup, "fast", device := Device(usable=needed, overcommits=True))
    assert device.trained == []


# --- fast -------------------------------------------------------------------------------------------------------


def table(*rows):
    """Tries from (batch, tokens per second), those without a speed out of memory."""
    return [
        Try(batch_size=size, micro_batch_size=None, outcome=RAN, tokens_per_second=speed, peak_bytes=size)
        if speed
        else Try(batch_size=size, micro_batch_size=None, outcome=OUT_OF_MEMORY)
        for size, speed in rows
    ]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(8, 100.0)], 8),
        ([(8, 94.9), (16, 100.0)], 16),
        ([(8, 95.0), (16, 100.0)], 8),
        ([(8, 10.0), (16, 19.0), (32, 36.0), (64, 40.0), (128, 41.0), (256, 42.0)], 64),
        ([(8, 10.0), (16, 30.0), (32, 20.0), (64, 31.0), (128, 0)], 16),
        ([(8, 0), (4, 7.0), (2, 9.0)], 2),
    ],
)
def test_the_smallest_within_five_per_cent(rows, expected):
    assert fastest_small(table(*rows)).batch_size == expected


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.1, 1e9) | st.just(0)), min_size=1, unique_by=lambda r: r[0])
)
def test_what_is_chosen_ran_and_is_near_the_best(rows):
    ran = {size: speed for size, speed in rows if speed}
    if not ran:
        return
    chosen = fastest_small(table(*rows))
    assert ran[chosen.batch_size] >= 0.95 * max(ran.values())
    assert all(speed < 0.95 * max(ran.values()) for size, speed in ran.items() if size < chosen.batch_size)
    assert largest_that_ran(table(*rows)).batch_size == max(ran)


@pytest.mark.parametrize(
    ("speeds", "stalled"),
    [
        ([100.0, 100.0], False),
        ([100.0, 104.0, 104.0], True),
        ([100.0, 104.0, 106.0], False),
        ([100.0, 106.0, 100.0], False),
        ([100.0, 200.0, 190.0, 209.0], True),
        ([50.0, 100.0, 60.0, 50.0], True),
    ],
)
def test_two_doublings_without_a_gain_end_it(speeds, stalled):
    assert has_stalled(table(*((8 << k, speed) for k, speed in enumerate(speeds)))) == stalled


def synthetic(monkeypatch, speed_of, memory_of_size, limit):
    """Tries from formulas instead of steps, as a GPU with this limit would give them."""

    def run(setup, memory, limit_bytes):
        size = setup.config.train.batch_size
        if memory_of_size(size) > 2 * limit:
            return Try(batch_size=size, micro_batch_size=None, outcome=OUT_OF_MEMORY)
        outcome = RAN if memory_of_size(size) <= limit_bytes else ABOVE_LIMIT
        facts = {"tokens_per_second": speed_of(size), "peak_bytes": memory_of_size(size)}
        facts |= {"step_seconds": 1.0, "full_seconds": 1.0}
        return Try(batch_size=size, micro_batch_size=None, outcome=outcome, **facts)

    monkeypatch.setattr(batch_finder, "run_try", run)


@given(fits=st.integers(1, 400), policy=st.sampled_from(("fill", "fast")), half=st.integers(1, 300))
def test_whatever_the_machine_is_the_answer_ran_and_fits(text_setup, fits, policy, half):
    with pytest.MonkeyPatch.context() as patch:
        synthetic(patch, lambda size: 1000 * size / (half + size), lambda size: size * MIB, fits * MIB)
        patch.setattr(Store, "choice", lambda self, key: None)
        patch.setattr(Store, "_add", lambda *_args: None)
        device = Device(usable=fits)
        choice = search_batch(device.setup(text_setup), policy, 1.0, lambda line: None, memory=device)
    assert choice.batch_size <= min(fits, 339)
    assert choice.batch_size in [one.batch_size for one in choice.tries if one.outcome == RAN]
    assert len(set(sizes(choice))) == len(sizes(choice))
    if policy == "fill":
        most = min(fits, 339)
        grain = 16 if most >= 256 else 8
        assert choice.batch_size > most - grain - (most < 8) * most  # below 8: the largest power of two


@pytest.fixture(scope="module")
def text_setup(text):
    return tiny_setup(text)


def test_fast_stops_where_it_gets_no_faster(text_setup, monkeypatch):
    synthetic(monkeypatch, lambda size: 100.0 * min(size, 24), lambda size: size * MIB, 10**4 * MIB)
    choice = found(text_setup, "fast")
    assert sizes(choice) == [8, 16, 32, 64, 128]
    assert (choice.batch_size, choice.ended_by) == (32, "speed")
    assert choice.reason == (
        "the smallest within 5% of the best speed, 2,400 tokens/s at batch 32; tried up to 128: no faster over two "
        "doublings"
    )


# --- recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_keeps_its_batch_and_takes_it_in_pieces(text):
    """That pieces give the gradient of the whole batch is tested beside the trainer."""
    setup = tiny_setup(text, batch_size=62, lr=None, lr_rule="sqrt")
    device = Device(room=20)
    choice = found(setup, "recipe", device)
    assert [(one.batch_size, one.micro_batch_size) for one in choice.tries] == [(62, None), (62, 31), (62, 16)]
    assert (choice.batch_size, choice.micro_batch_size) == (62, 16)
    assert {14, 16} <= set(device.trained[-8:])  # 62 = 16 + 16 + 16 + 14
    settled = with_batch(setup, choice.batch_size, choice.micro_batch_size)
    assert settled.rate == setup.rate
    assert settled.steps_per_epoch == setup.steps_per_epoch


def test_a_recipe_that_fits_is_left_whole(text):
    choice = found(tiny_setup(text, batch_size=62), "recipe", Device(room=62))
    assert (choice.micro_batch_size, len(choice.tries)) == (None, 1)


# --- what a try leaves behind -----------------------------------------------------------------------------------


def test_a_try_within_an_except_block_would_keep_the_tensors():
    """The control for `alive`: the search's own way leaves the block first."""
    device = Device(room=1)
    weights, tokens = None, torch.zeros(2, 3)
    try:
        device.run(weights, tokens)
    except RuntimeError:
        device.clear()
        device.start()
    device.clear()
    device.start()
    assert device.alive == [True, False]


@pytest.mark.parametrize(("mode", "threads"), [(torch.no_grad, 2), (torch.inference_mode, 1), (torch.enable_grad, 1)])
def test_generators_modes_and_a_model_in_use_stay_as_they_are(text, tmp_path, mode, threads):
    trainer = tiny_trainer(tiny_setup(text), tmp_path / "run")
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.randn(3)
    before = generator_states(), torch.get_default_dtype(), torch.get_num_threads(), trainer.model.training
    with mode():
        grads = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found(tiny_setup(text, threads=threads, eval_batch_size=8), "fill", Device(room=8))
        assert grads == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert before[1:] == (torch.get_default_dtype(), torch.get_num_threads(), trainer.model.training)
    assert same(generator_states(), before[0])
    assert same(dict(trainer.model.state_dict()), weights)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_generators_are_put_back_after_an_error_too(text):
    before = generator_states()
    with pytest.raises(RuntimeError, match="of another kind"):
        found(tiny_setup(text), "fill", Device(room=9, error=RuntimeError("of another kind")))
    assert same(generator_states(), before)


@pytest.mark.parametrize(("precision", "optimizer"), [("fp16", "adam"), ("fp32", "muon"), ("bf16", "adamw")])
def test_a_try_makes_the_optimizers_state_and_skips_no_step(text, precision, optimizer):
    """A skipped step would leave the optimizer's memory out of the peak: FP16 would skip here at its usual scale."""
    setup = tiny_setup(text, precision=precision, optimizer=optimizer, output_std=10.0)
    copy = trial._Copy(setup)
    before = {name: value.clone() for name, value in copy.model.state_dict().items()}
    assert not copy.step(copy.full_rows(1)).skipped
    assert all(one.state for one in copy.step.optimizers)
    assert same(dict(copy.model.state_dict()), before)  # at rate 0, so that no recipe can run away meanwhile
    copy.step.renew_scaler()
    assert copy.step(copy.full_rows(1)).skipped == (precision == "fp16")


def test_rows_of_a_try_are_full_and_timed_ones_are_the_runs_own(text):
    setup = tiny_setup(text, batch_size=100)
    copy = trial._Copy(setup)
    full = copy.full_rows(50)
    assert (full.shape, full.dtype, int(full.min()) >= 4, int(full.max()) < 34) == ((50, 12), torch.int64, True, True)
    rows = torch.cat([copy.batches.read_repeating(number) for number in range(4)])
    whole = torch.from_numpy(setup.train_split.ids).long()
    assert torch.equal(rows[:339].sort(0).values, whole.sort(0).values)
    assert torch.equal(rows[339:400], rows[:61])  # the epoch again


def test_a_try_of_a_stream_carries_the_context(text, monkeypatch):
    monkeypatch.setattr(trial, "_STEPS", 3)
    contexts = []

    def run(weights, tokens, context, *rest):
        hidden, after = fused.recurrence(weights, tokens, context, *rest)
        contexts.append((context.detach().clone(), after.detach().clone()))
        return hidden, after

    setup = tiny_setup(text, layout="stream", sequence_length=24)
    trial._Copy(dataclasses.replace(setup, engine=EngineChoice("fused", run, ""))).timed()
    assert not contexts[0][0].any()
    assert len(contexts) == 3
    for (_, after), (before, _) in itertools.pairwise(contexts):
        assert torch.equal(after, before)


# --- this very machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "layout"), [("fast", "windows"), ("fill", "stream"), ("recipe", "windows")])
def test_a_real_search_on_the_cpu(text, policy, layout):
    lines = []
    config = tiny_config(text, batch_size=40, layout=layout, sequence_length=24)
    choice = find_batch(config, policy=policy, report=lines.append)
    tried = next(one for one in choice.tries if one.batch_size == choice.batch_size)
    assert tried.outcome == RAN
    assert tried.tokens_per_second == choice.tokens_per_second > 100
    assert choice.peak_bytes < 2**30 < choice.usable_bytes
    assert len(lines) == len(choice.tries) == (1 if policy == "recipe" else len(set(sizes(choice))))
    assert lines[0].startswith("batch 40: " if policy == "recipe" else "batch 8: ")
    assert find_batch is nl.find_batch


def test_memory_of_a_process_is_seen(text, monkeypatch):
    machine = tiny_setup(text).machine
    memory = ProcessMemory(machine)
    assert 2**28 < memory.usable_bytes <= machine.memory_bytes
    memory.start()
    if memory.peak_bytes() is None:
        pytest.skip("this system does not let a process begin a new peak (/proc/self/clear_refs)")
    torch.ones(64 * MIB // 4).sum()
    assert 63 * MIB < memory.peak_bytes() < 128 * MIB
    memory.start()
    assert memory.peak_bytes() < 32 * MIB  # the peak before is forgotten
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_args, **_kwargs: (_ for _ in ()).throw(PermissionError()))
    memory.start()
    assert memory.peak_bytes() is None
    setup = tiny_setup(text)
    tried = run_try(setup, memory, 2**40)
    assert (tried.peak_bytes, tried.reason) == (memory_estimate_bytes(setup), "memory estimated from the shapes")


def process_memory(text):
    memory = ProcessMemory(tiny_setup(text).machine)
    memory.start()
    if memory.peak_bytes() is None:
        pytest.skip("this system does not let a process begin a new peak, or keeps what is freed")
    return memory


@pytest.mark.slow
def test_a_second_search_sees_as_much_memory_as_the_first(text):
    process_memory(text)
    shape = {"hidden_dim": 512, "num_layers": 6, "context_dim": 256, "embed_dim": 128}
    setup = tiny_setup(text, precision="bf16", batch_size=320, **shape)
    lines = []
    first, *others = (
        search_batch(setup, "recipe", memory_share=share, report=lines.append).peak_bytes for share in (0.9, 0.8, 0.7)
    )
    # weights, gradients and Adam's two moments in FP32; a hidden vector for each slot and layer in BF16
    assert first > 16 * setup.config.model.num_parameters + 2 * 320 * 11 * 6 * 512 > 50 * MIB
    assert all(0.75 * first < other < 1.25 * first for other in others), (first, others)
    assert "found earlier" not in "".join(lines)


def test_what_the_pool_of_blocks_holds_is_given_back_first(text):
    like, memory = torch.empty(0), process_memory(text)
    for _ in range(2):
        BUFFERS.empty(32 * MIB // 4, like=like).fill_(1)  # back in the pool at once
        assert BUFFERS.kept_bytes > 32 * MIB
        memory.clear()
        assert BUFFERS.kept_bytes == 0
        memory.start()
        BUFFERS.empty(32 * MIB // 4, like=like).fill_(1)
        assert memory.peak_bytes() > 31 * MIB
    memory.clear()


def test_an_allocator_that_gives_nothing_back_is_not_believed(text, monkeypatch):
    memory = process_memory(text)
    glibc, asked = ctypes.CDLL("libc.so.6"), []
    loaded = SimpleNamespace(malloc=glibc.calloc)  # in the place of glibc's, as a preloaded library does
    monkeypatch.setattr(memory_room.ctypes, "CDLL", lambda name: glibc if name else loaded)
    memory.start()
    assert memory.peak_bytes() is None
    loaded.MallocExtension_ReleaseFreeMemory = lambda: asked.append("TCMalloc")
    memory.start()
    assert memory.peak_bytes() is not None
    assert asked == ["TCMalloc"]


# --- remembered -------------------------------------------------------------------------------------------------


def refuse(*_args):
    raise AssertionError("a try was run")


def cached(setup, policy="fill", usable=20, **options):
    """A search that may not run anything."""
    lines = []
    setup = dataclasses.replace(setup, engine=EngineChoice("fused", refuse, ""))
    choice = search_batch(setup, policy, report=lines.append, memory=Device(usable=usable), **options)
    assert len(lines) == 1
    assert f"batch {choice.batch_size}: found earlier on this machine" in lines[0]
    return choice


def test_a_configuration_is_searched_once(text):
    setup = tiny_setup(text)
    first = found(setup, "fill", Device(usable=20))
    again = cached(tiny_setup(text, lr=1e-2, seed=7, epochs=9))  # what changes neither time nor memory
    assert again == dataclasses.replace(first, cached=True)
    for changed in ({"hidden_dim": 13}, {"dropout": 0.0}, {"sequence_length": 13}, {"optimizer": "adamw"},
                    {"eval_batch_size": 4}):  # fmt: skip
        with pytest.raises(AssertionError, match="a try was run"):
            cached(tiny_setup(text, **changed))
    for other in ({"policy": "fast"}, {"memory_share": 0.8}, {"seconds": 59.0}):
        with pytest.raises(AssertionError, match="a try was run"):
            cached(setup, **other)


def test_what_no_longer_fits_or_could_be_larger_is_searched_again(text):
    setup = tiny_setup(text)
    assert found(setup, "fill", Device(usable=20)).peak_bytes == 16 * MIB
    for usable in (18, 21, 22):  # 16 are at most 90 % of it, and it is not more than a tenth larger
        cached(setup, usable=usable)
    for usable in (17, 23):
        with pytest.raises(AssertionError, match="a try was run"):
            cached(setup, usable=usable)


@pytest.mark.parametrize("spoil", [
    lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff\xfe\x00", lambda raw: b"[]",
    lambda raw: raw.replace(b'"choices": {', b'"choices": [], "others": {'),
    lambda raw: raw.replace(b'"peak_bytes"', b'"peak"'),
    lambda raw: raw.replace(b'"peak_bytes": 1', b'"peak_bytes": "1", "p": 1'),
    lambda raw: raw.replace(b'"torch": "', b'"torch": "0'),
])  # fmt: skip
def test_a_damaged_memory_is_replaced(text, spoil, monkeypatch):
    synthetic(monkeypatch, lambda size: 100.0 * size, lambda size: size * MIB, 20 * MIB)
    setup = tiny_setup(text)
    first = found(setup, "fill", Device(usable=20))
    path = Store(setup.machine).path
    path.write_bytes(spoil(path.read_bytes()))
    second = found(setup, "fill", Device(usable=20))
    assert (second.batch_size, second.cached) == (first.batch_size, False)
    assert cached(setup).batch_size == first.batch_size
    assert json.loads(path.read_bytes())["choices"]


def test_a_memory_that_cannot_be_written_costs_only_time(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "file"))
    assert found(tiny_setup(text), "fill", Device(usable=20)).batch_size == 16
