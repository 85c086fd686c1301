"""What is shown has no user's name and no secret in it; what a run needs to continue is kept."""

import json
import subprocess

import pytest
from tiny import Quiet, tiny_command, tiny_config

import newllm_lib as nl
from newllm_lib.escaping import (
    html_text,
    impersonal,
    markdown_text,
    shell_command,
    shell_word,
    terminal_text,
    visible_text,
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "jane"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_paths_under_home_are_shown_with_a_tilde(home, tmp_path):
    for text, expected in (
        (f"{home}/results/r: done", "~/results/r: done"),
        (f"cannot read '{home}/a b' ({home}/c)", "cannot read '~/a b' (~/c)"),
        (f"{home}", "~"),
        (f"--results-dir {home} --x", "--results-dir ~ --x"),
        (f"/mnt{home}/x", f"/mnt{home}/x"),  # another place
        (f"{home}y/x", f"{home}y/x"),
        ("~/x", "~/x"),
    ):
        assert impersonal(text) == terminal_text(text) == expected
        assert visible_text(text) == text
    assert html_text(f"{home}/<b>") == "~/&lt;b&gt;"
    assert markdown_text(f"{home}/r") == "&#126;/r"


@pytest.mark.parametrize("home", ["/", "", "~"])
def test_a_home_that_is_everything_or_nothing_shortens_nothing(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert impersonal("/usr/lib/x ~/y") == "/usr/lib/x ~/y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://jane:secret@host/x", "https://***@host/x"),
        ("https://host/x?a=1&token=abc&b=2", "https://host/x?a=1&token=***&b=2"),
        ("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz", "HF_TOKEN=***"),
        ("https://host/x@1.0", "https://host/x@1.0"),
        (
            "https://host/x?access_token=a1&X-Amz-Signature=b2&n=3",
            "https://host/x?access_token=***&X-Amz-Signature=***&n=3",
        ),
        ("https://host/x?api_key=a1", "https://host/x?api_key=***"),
        ("hf_hub is a name", "hf_hub is a name"),
    ],
)
def test_no_token_is_shown(text, expected):
    assert terminal_text(text) == expected


def test_a_shown_command_works_when_it_is_pasted(home):
    (home / "my data").mkdir()
    (home / "my data" / "x'$y").write_text("read")
    words = ["cat", str(home / "my data" / "x'$y")]
    command = shell_command(words)
    assert str(home) not in command
    assert command.startswith("cat ~/'my data/x'")
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == "read"
    assert shell_word(str(home)) == "~"
    assert shell_word("~/x") == "'~/x'"  # a file of that name, in the folder where one is


@pytest.mark.slow
def test_a_run_under_home_tells_no_users_name_and_goes_on(home, text, tmp_path):
    import shutil

    shutil.copytree(text, home / "texts")
    config = tiny_config(home / "texts", name="r", results_dir=str(home / "results"))
    shown = subprocess.run(tiny_command(config, steps=6), capture_output=True, text=True, check=True)
    assert str(home) not in shown.stdout + shown.stderr
    assert "written to ~/results/r/: " in shown.stdout
    record = json.loads((home / "results" / "r" / "run.json").read_text())
    assert record["config"]["data"]["data"] == str(home / "texts")  # which it needs
    kept = {name: value for name, value in record.items() if name not in ("config", "requested")}
    assert str(home) not in json.dumps(kept)
    assert "--data ~/texts" in record["commands"][0]
    assert str(home) not in (home / "results" / "r" / "report.md").read_text()
    run = nl.load(home / "results" / "r")
    again = nl.train(run.requested, max_steps=8, progress=Quiet())
    assert (again.folder, again.record.step) == (run.folder, 8)
    assert str(home) not in repr(run)
    with pytest.raises(nl.NewLLMError) as caught:
        nl.load(home / "nowhere")
    assert str(caught.value).startswith("~/nowhere: no run here")
    wrong = subprocess.run(
        tiny_command(config.replace(data=str(home / "nowhere"))), check=False, capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert str(home) not in wrong.stderr and "~/nowhere" in wrong.stderr
