"""What the machine is and how fast it multiplies; which batch fits it; how fast a run will be. All of it measured."""

from newllm_lib.system.memory import free_memory_bytes
from newllm_lib.tuning.batch_finder import BatchChoice, find_batch, search_batch, settle_batch
from newllm_lib.tuning.execution import SharedExecution, settle_execution
from newllm_lib.tuning.machine import probe, probe_lines, product_rate
from newllm_lib.tuning.throughput import estimate_speed
from newllm_lib.tuning.trial import Try

__all__ = [
    "BatchChoice",
    "SharedExecution",
    "Try",
    "estimate_speed",
    "find_batch",
    "free_memory_bytes",
    "probe",
    "probe_lines",
    "product_rate",
    "search_batch",
    "settle_batch",
    "settle_execution",
]
