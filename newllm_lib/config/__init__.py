"""What a run is: its configuration, every field declared with its range and its unit; nothing here needs torch."""

from newllm_lib.config.configs import (
    BOS,
    EOS,
    IDENTITY_VERSION,
    NAMED_TEXTS,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    DataConfig,
    FlatField,
    ModelConfig,
    RunConfig,
    TrainConfig,
    flat_fields,
)

__all__ = [
    "BOS",
    "EOS",
    "IDENTITY_VERSION",
    "NAMED_TEXTS",
    "PAD",
    "SPECIAL_TOKENS",
    "UNK",
    "DataConfig",
    "FlatField",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "flat_fields",
]
