"""A run and its folder: trained or continued, recorded, copied, extended."""

from newllm_lib.runs.api import evaluate, load, plan, side_by_side, train
from newllm_lib.runs.run import Loaded, Run, load_model

__all__ = ["Loaded", "Run", "evaluate", "load", "load_model", "plan", "side_by_side", "train"]
