"""run.json: what its keys are, that nothing in it is lost, and that every file of a run's folder has one name."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import newllm_lib
from newllm_lib.errors import RunError
from newllm_lib.reporting.record import (
    KEYS,
    RunRecord,
    contents,
    history_rows,
    holds_run,
    read_record,
    record_text,
    write_record,
)

LEAST = {"run": "r", "status": "running", "config": {}, "decided": {}, "best": None}
"""All that the very first versions are sure to have written."""

WRITTEN = """{
  "run": "small",
  "status": "finished",
  "decided": {
    "batch_size": 8
  },
  "plan": [
    [
      "run",
      "results/small"
    ]
  ],
  "config": {},
  "step": 16,
  "best": {
    "step": 16,
    "val_loss": 2.5,
    "val_ppl": null
  }
}
"""


def test_the_file_is_the_dictionary_with_its_keys_in_order(tmp_path):
    record = RunRecord(run="small", status="running", decided={"batch_size": 8}, plan=[("run", "results/small")])
    record.config, record.step = {}, 16
    record.best = {"step": 16, "val_loss": 2.5, "val_ppl": float("inf")}
    record.status = "finished"
    write_record(tmp_path, record)
    assert (tmp_path / "run.json").read_text() == WRITTEN
    found = read_record(tmp_path)
    assert found == json.loads(WRITTEN) == record.to_dict()
    assert (found.run, found.step, found.best["val_ppl"], found.total_steps) == ("small", 16, None, None)


def test_a_record_is_used_like_the_dictionary_in_its_file():
    record = RunRecord(run="r", step=3)
    assert (record["run"], record.get("best"), "best" in record, record | {"step": 4}) == (
        "r", None, False, {"run": "r", "step": 4},
    )  # fmt: skip
    assert json.dumps(record) == '{"run": "r", "step": 3}'
    assert copy.deepcopy(record) == record and copy.deepcopy(record).step == 3
    assert not RunRecord()


def test_committed_records_are_read_and_written_again_byte_for_byte(repository):
    files = sorted((repository / "results" / "reference").glob("*/run.json"))
    assert len(files) >= 6
    for file in files:
        record, values = read_record(file.parent), json.loads(file.read_text())
        assert record_text(record) == file.read_text()
        assert {name: getattr(record, name) for name in KEYS} == dict.fromkeys(KEYS) | values
    assert any(read_record(file.parent).requested is None for file in files)  # an old one is among them


def test_what_an_older_version_did_not_write_is_none_and_what_a_newer_one_wrote_is_kept(tmp_path):
    values = {"newer": {"than": ["this"]}} | LEAST
    (tmp_path / "run.json").write_text(json.dumps(values))
    record = read_record(tmp_path)
    assert [name for name in KEYS if getattr(record, name) is not None] == ["run", "status", "decided", "config"]
    record.step = 2
    write_record(tmp_path, record)
    assert (tmp_path / "run.json").read_text() == json.dumps(values | {"step": 2}, indent=2) + "\n"


def test_a_key_that_is_not_declared_is_a_bug_of_the_writer():
    with pytest.raises(TypeError, match=r"run\.json has no key stauts"):
        RunRecord(run="r", stauts="finished")
    record = RunRecord(run="r")
    with pytest.raises(AttributeError, match=r"run\.json has no key stauts"):
        record.stauts = "finished"
    with pytest.raises(AttributeError, match=r"run\.json has no key stauts"):
        _ = record.stauts
    assert record == {"run": "r"}


@pytest.mark.parametrize("name", LEAST)
def test_a_record_without_a_key_that_every_run_has_is_none(tmp_path, name):
    (tmp_path / "run.json").write_text(json.dumps({key: value for key, value in LEAST.items() if key != name}))
    with pytest.raises(RunError, match=rf"run\.json: not the record of a run, {name} missing; move it away"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_another_file_is_no_record(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match="not the record of a run, best, config, decided, run, status missing"):
        read_record(tmp_path)


@pytest.mark.parametrize("name", KEYS)
def test_a_value_of_another_type_is_named(tmp_path, name):
    wrong = 3 if isinstance("", KEYS[name]) else "x"
    (tmp_path / "run.json").write_text(json.dumps(LEAST | {name: wrong}))
    with pytest.raises(RunError, match=rf"run\.json: damaged, {name} not what a run writes; move it away"):
        read_record(tmp_path)


def test_a_damaged_row_is_named_by_its_column(tmp_path):
    (tmp_path / "run.json").write_text(
        json.dumps(LEAST | {"best": {"step": 1, "val_loss": 1.0, "val_ppl": "low"}, "step": "3"})
    )
    with pytest.raises(RunError, match=r"damaged, step, best\.val_ppl not what a run writes"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"best": {}}, "best.step, best.val_loss, best.val_ppl"),
        ({"validation": {"digest": {}}}, "validation.digest"),
        ({"validation": {"unknown_share": "x"}}, "validation.unknown_share"),
        ({"data": {"name": {}, "fingerprint": 7}}, "data.name, data.fingerprint"),
    ],
)
def test_what_is_read_within_a_value_is_named(tmp_path, change, name):
    (tmp_path / "run.json").write_text(json.dumps(LEAST | change))
    with pytest.raises(RunError, match=rf"run\.json: damaged, {re.escape(name)} not what a run writes"):
        read_record(tmp_path)


@pytest.mark.parametrize("cell", ["a", f'"{"1" * 200_000}"'])
def test_a_history_that_is_no_table_names_the_line(tmp_path, cell):
    (tmp_path / "history.csv").write_text(f"step,epoch\n1,1\n{cell},1\n")
    with pytest.raises(RunError, match=r"history\.csv: line 3: .*; the file is damaged"):
        history_rows(tmp_path)


def _values(kind):
    """What a key of this type may hold, as JSON has it."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    of = {
        str: st.text(), int: st.integers(), float: finite, bool: st.booleans(), type(None): st.none(),
        dict: st.dictionaries(st.text(), finite | st.text()), list: st.lists(st.text()),
    }  # fmt: skip
    return st.one_of(*(of[one] for one in getattr(kind, "__args__", (kind,))))


UNKNOWN = st.dictionaries(st.text().filter(lambda name: name not in KEYS), st.integers() | st.lists(st.text()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    st.fixed_dictionaries(
        {name: _values(KEYS[name]) for name in LEAST if name != "best"} | {"best": st.none()},
        optional={name: _values(kind) for name, kind in KEYS.items() if name not in LEAST},
    ),
    UNKNOWN,
    st.randoms(use_true_random=False),
)
def test_reading_and_writing_lose_nothing(tmp_path, known, unknown, random):
    items = list((known | unknown).items())
    random.shuffle(items)
    (tmp_path / "run.json").write_text(json.dumps(dict(items), indent=2) + "\n")
    before = (tmp_path / "run.json").read_text()
    record = read_record(tmp_path)
    assert all(getattr(record, name) == known.get(name) for name in KEYS)
    write_record(tmp_path, record)
    assert (tmp_path / "run.json").read_text() == before


def test_the_contents_of_a_folder_are_those_that_are_there(tmp_path):
    assert (contents(tmp_path), holds_run(tmp_path)) == ("", False)
    for name in ("run.json", "report.md", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    assert (contents(tmp_path), holds_run(tmp_path)) == ("report.md, run.json, model/", True)


NAMES = {
    "run.json", "history.csv", "curves.png", "report.md", "checkpoints", "model.safetensors", "config.json",
    "tokenizer.json", "README.md",
}  # fmt: skip


def literals(source: str) -> list[str]:
    """The names of a run's files that a module spells out itself, in a path or as they stand."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and set(text.split("/")) & NAMES and " " not in text]


def test_only_one_module_spells_the_names_of_a_runs_files():
    root = Path(newllm_lib.__file__).parent
    found = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if literals(path.read_text())}
    assert found == {"reporting/record.py"}


def test_a_name_that_is_spelled_out_is_found():
    assert literals('path = folder / "run.json"') == ["run.json"]
    assert literals('path = folder / f"checkpoints/{name}"') == ["checkpoints/"]
    assert literals('"""What run.json holds."""\nraise ValueError("no run.json in it")') == []
