"""Access to the Hugging Face hub that never asks: not for a token in Colab's secrets, not for a login."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants


def own_hub_token() -> str | bool:
    """The token in HF_TOKEN, or that of the stored login; False = none, which also keeps the hub's library from asking.

    Left to itself it asks Colab's `userdata` for a secret: a pop-up in the page, ten seconds of waiting elsewhere.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token
    try:
        return Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip() or False
    except (OSError, ValueError):
        return False
