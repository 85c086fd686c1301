"""Nothing is asked on Colab: the hub's own library runs, with a stand-in for Colab's secrets that records questions."""

import json
import os
import subprocess
import sys

import pytest

from newllm_lib.errors import ConfigError
from newllm_lib.system.hub import own_hub_token

SCRIPT = """
import json, sys
from types import ModuleType
from huggingface_hub.utils import _auth

asked = []
names = ("google", "google.colab", "google.colab.userdata", "google.colab.errors")
google, colab, userdata, errors = map(ModuleType, names)
colab.userdata, google.colab = userdata, colab
userdata.get = lambda name: asked.append(name) or "hf_of_the_secrets"
userdata.NotebookAccessError = userdata.SecretNotFoundError = type("Refused", (Exception,), {})
errors.Error = type("Error", (Exception,), {})
sys.modules |= dict(zip(names, (google, colab, userdata, errors)))
_auth.is_google_colab = lambda: True

import huggingface_hub
from newllm_lib.data import corpus
from newllm_lib.model.newllm import NewLLM

def attempt(call):
    asked.clear()
    _auth._IS_GOOGLE_COLAB_CHECKED = False
    try:
        call()
    except BaseException as error:
        return [*asked, type(error).__name__]
    return [*asked, "done"]

calls = {
    "named corpus": corpus._why_no_hub,
    "own model": lambda: NewLLM.from_pretrained("someone/model"),
    "control: metadata": lambda: huggingface_hub.HfApi().dataset_info("Salesforce/wikitext", timeout=2),
    "control: model": lambda: super(NewLLM, NewLLM).from_pretrained("someone/model"),
}
print(json.dumps({name: attempt(call) for name, call in calls.items()}))
"""


@pytest.mark.slow  # the hub's library tries again for a while
def test_neither_a_named_corpus_nor_a_users_model_asks_for_a_secret(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # where nobody answers
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, env=environment, timeout=200
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert "HF_TOKEN" not in found["named corpus"] + found["own model"]
    assert found["control: metadata"][0] == found["control: model"][0] == "HF_TOKEN"


def test_the_token_of_the_environment_then_that_of_the_login(tmp_path, monkeypatch):
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert own_hub_token() is False
    (tmp_path / "token").write_text(" hf_login\n")
    assert own_hub_token() == "hf_login"
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert own_hub_token() == "hf_environment"
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.delenv("HF_TOKEN")
    assert own_hub_token() is False


def test_an_upload_without_a_token_says_how_to_get_one(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from newllm_lib.config import ModelConfig
    from newllm_lib.model.newllm import NewLLM

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="push_to_hub needs a token: set HF_TOKEN, log in with"):
        NewLLM(ModelConfig(vocab_size=8, hidden_dim=8, embed_dim=4, context_dim=4)).push_to_hub("someone/model")
