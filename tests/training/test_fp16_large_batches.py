"""Large batches in FP16: skipped steps are few, and the loss scale settles where the gradients do not underflow.

Run as a script it prints the table that results/LOG.md quotes:

    python tests/training/test_fp16_large_batches.py [WIDTH [BATCH ...]]
"""

import sys
import tempfile
from pathlib import Path

import pytest

import newllm_lib as nl
from newllm_lib.errors import TrainingError
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.hardware import detect, native_formats

ATTEMPTS = 26  # two epochs of a100_fp16, each with its short last batch
CASES = [("a100_fp16", 2048), ("a100_fp16", 4096), ("auto", 2048), ("auto", 4096)]
EMULATED = [("a100_fp16", 4096)]
"""What a processor without FP16 of its own runs, for minutes: here nearly every step was skipped once."""


def attempts(preset: str, batch: int, width: int, data: Path, results: Path) -> tuple[list[bool], list[float], str]:
    """Which of the first steps of a preset in FP16 were skipped, the loss scale after each, and how the run ended."""
    skipped, scales = [], []

    def watch(trainer):
        def on_step(result):
            skipped.append(result.skipped)
            scales.append(trainer.scaler.get_scale())
            if len(skipped) == ATTEMPTS:
                trainer.request_stop()

        trainer.on_step = on_step

    shape = {"hidden_dim": width, "embed_dim": width // 2, "context_dim": width // 2}
    fp16 = {"precision": "fp16", "emulate_precision": True, "device": "cpu"}
    often = {"validate_every_steps": None}
    try:
        run = nl.train(
            preset, data=str(data), results_dir=str(results), batch_size=batch, progress=Progress(), watch=watch,
            **shape, **fp16, **often,
        )  # fmt: skip
    except TrainingError as error:
        return skipped, scales, str(error)
    return skipped, scales, run.record["status"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "batch"), CASES)
def test_fp16_skips_few_steps_of_a_large_batch(preset, batch, wikitext, tmp_path, no_pictures):
    is_native = "fp16" in native_formats(detect("cpu"))
    if not is_native and (preset, batch) not in EMULATED:
        pytest.skip("FP16 is emulated here, and takes minutes")
    # emulated, a step at width 128 takes half a minute; the sums that overflow are over the targets, at any width
    width = 128 if is_native else 32
    skipped, scales, end = attempts(preset, batch, width, wikitext, tmp_path)
    assert (len(skipped), end) == (ATTEMPTS, "interrupted")
    assert sum(skipped) <= 4
    assert not any(skipped[13:])
    assert scales[-1] >= 1024


def table(width: int, batches: list[int]) -> None:
    """Prints a row for each case; WikiText-2 lies where the tests look for it."""
    data = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2"
    print(
        "| preset | batch | width | attempts | skipped | loss scale at the end | end |\n|---|---|---|---|---|---|---|"
    )
    for preset, batch in CASES:
        if batch in batches:
            with tempfile.TemporaryDirectory() as results:
                skipped, scales, end = attempts(preset, batch, width, data, Path(results))
            count = sum(skipped)
            print(f"| `{preset}` | {batch} | {width} | {len(skipped)} | {count} | {scales[-1]:g} | {end} |", flush=True)


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 128, [int(size) for size in sys.argv[2:]] or [2048, 4096])
