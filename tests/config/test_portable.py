"""No path leaves a machine with a run, and none that arrives with one is obeyed."""

import dataclasses
import json
import re
import shutil
import zipfile

import pytest
from hostile import DATA_NAME, hostile_bundle, write_zip
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib.config import NAMED_TEXTS, RunConfig, flat_fields, portable
from newllm_lib.data.corpus import HUB_CONFIGS
from newllm_lib.errors import BundleError
from newllm_lib.reporting.progress import Progress
from newllm_lib.training.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A home with a text in it, a Drive, and a run of it that is copied there."""
    home = tmp_path_factory.mktemp("home") / "jane"
    (home / "drive").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("newllm_lib.reporting.curves.write_curves", lambda *args: None)
        patch.setattr("sys.argv", ["newllm", "train", "--data", f"{home}/secret/wiki", f"--mirror-dir={home}/drive"])
        data, places = write_text(home / "secret" / "wiki"), {"mirror_dir": str(home / "drive")}
        nl.train(tiny_config(data, results_dir=str(home / "results"), name="r", **places), progress=Progress())
    return home


def words_of(path):
    """Every text in a bundle or a folder that can be read as one."""
    if path.is_dir():
        return "\n".join(found.read_bytes().decode("latin-1") for found in path.rglob("*") if found.is_file())
    with zipfile.ZipFile(path) as archive:
        return "\n".join(archive.read(name).decode("latin-1") for name in archive.namelist())


def test_every_field_that_names_a_place_is_marked():
    paths = {name for name, item in flat_fields().items() if item.metadata["path"]}
    assert paths == {"data", "results_dir", "mirror_dir"}
    said = {name for name, item in flat_fields().items() if "older" in item.doc and name != "name"}
    assert said == paths  # a new field that is a folder shall be marked as well
    assert ("builtin", *HUB_CONFIGS) == NAMED_TEXTS


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/jane/wiki", "wiki"), ("wiki/", "wiki"), ("C:\\Users\\jane\\a.txt", "a.txt"), ("../..", "text"),
     ("/", "text"), ("~", "text"), ("src/**/*.py", "*.py"), ("builtin", "builtin"), ("elsewhere:wiki", "wiki")],
)  # fmt: skip
def test_the_last_part_of_a_path(path, name):
    assert portable.last_part(path) == name


def test_a_command_is_told_without_paths():
    told = portable.portable_command("newllm train auto --data '/home/jane/my wiki' --mirror-dir=/mnt/x --lr 0.1")
    assert told == "newllm train auto --data 'my wiki' --mirror-dir=x --lr 0.1"
    from_python = "newllm_lib.train(...) from Python"  # no command either; older bundles hold it quoted
    assert portable.portable_command(from_python) == from_python
    assert portable.portable_command("'newllm_lib.train(...)' from Python") == from_python
    assert portable.portable_command("it's in /home/jane/x") == "it's in x"  # no command of a shell


def test_leaving_and_arriving_by_hand():
    config = RunConfig().replace(data=("/a/x.txt", "builtin"), results_dir="/a/r", mirror_dir="/a/m").to_dict()
    leaving, arriving = portable.portable_config(config), portable.received_config(config)
    assert leaving["data"]["data"] == ["x.txt", "builtin"]
    assert arriving["data"]["data"] == ["elsewhere:x.txt", "builtin"]
    for changed in (leaving, arriving):
        assert (changed["results_dir"], changed["mirror_dir"]) == ("results", None)
        assert portable.portable_config(changed) == leaving
        assert RunConfig.from_dict(changed).identity("f") == RunConfig.from_dict(config).identity("f")
    assert config["results_dir"] == "/a/r"  # what is given stays as it is


def test_no_path_is_in_a_bundle_a_report_or_a_card(place, tmp_path):
    folder = place / "results" / "r"
    assert "jane" in (folder / "run.json").read_text()  # where the run itself goes on from
    bundle = nl.bundle(folder, tmp_path / "r.zip", checkpoint=True)
    card = nl.export(folder, tmp_path / "model")
    for found in (words_of(bundle), words_of(card), (folder / "report.md").read_text(), nl.load(folder).report):
        assert "jane" not in found
        assert "secret" not in found
    assert "newllm train --data wiki --mirror-dir=drive" in (folder / "report.md").read_text()
    with zipfile.ZipFile(bundle) as archive:
        assert json.loads(archive.read("run.json"))["requested"]["data"]["data"] == "wiki"


@pytest.mark.slow
def test_the_run_goes_on_where_its_text_is_named(place, tmp_path):
    bundle = nl.bundle(place / "results" / "r", tmp_path / "r.zip", checkpoint=True)
    run = nl.find_run(bundle, results_dir=tmp_path / "here")
    said = r"data wiki: this text is on the machine that the run came from\. Pass where it is on this one: data="
    (tmp_path / "wiki").mkdir()  # whatever lies there under that name is not meant
    for call in (lambda: nl.extended(run, epochs=3), lambda: nl.train(run.requested), lambda: nl.evaluate(run)):
        with pytest.raises(ValueError, match=said):
            call()
    longer = nl.train(nl.extended(run, epochs=3, data=str(place / "secret" / "wiki")), progress=Progress())
    assert longer.record["status"] == "finished"
    assert longer.record["identity"] == nl.load(place / "results" / "r").record["identity"]
    assert nl.train(nl.extended(longer, epochs=4), progress=Progress()).record["step"] > longer.record["step"]


@pytest.mark.slow
def test_a_named_text_needs_no_name_from_the_receiver(tmp_path):
    run = nl.train(
        tiny_config("builtin", results_dir=str(tmp_path / "there"), name="b", epochs=None, max_steps=2),
        progress=Progress(),
    )
    run = nl.find_run(nl.bundle(run, tmp_path / "b.zip", checkpoint=True), results_dir=tmp_path / "here")
    assert nl.train(nl.extended(run, max_steps=3), progress=Progress()).record["step"] == 3


def test_the_own_run_is_found_in_its_own_bundle(place, tmp_path):
    shutil.copytree(place / "results", tmp_path / "results")
    bundle = nl.bundle(tmp_path / "results" / "r", tmp_path / "r.zip", checkpoint=True)
    before = (tmp_path / "results" / "r" / "run.json").read_bytes()
    said = []
    assert [run.folder.name for run in nl.gather(bundle, results_dir=tmp_path / "results", report=said.append)] == ["r"]
    assert said == []
    assert (tmp_path / "results" / "r" / "run.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_no_path_of_a_stranger_is_obeyed(place, tmp_path, kind):
    obeyed = tmp_path / "obeyed"
    obeyed.mkdir()
    wish = {"results_dir": str(obeyed), "mirror_dir": str(obeyed)}
    if kind == "bundle":
        with zipfile.ZipFile(nl.bundle(place / "results" / "r", tmp_path / "honest.zip", checkpoint=True)) as archive:
            files = {name: archive.read(name) for name in archive.namelist() if name != "MANIFEST.json"}
        record = json.loads(files["run.json"])
        for part in ("config", "requested"):
            record[part] |= wish
            record[part]["data"]["data"] = "/etc/passwd"
        file = write_zip(files | {"run.json": json.dumps(record).encode()}, "r", tmp_path / "evil.zip")
        opened = nl.open_bundle(file, tmp_path / "opened")
        assert (opened.requested.mirror_dir, opened.config.results_dir) == (None, "results")
        assert opened.requested.data.data == "elsewhere:passwd"
        assert nl.open_bundle(file, tmp_path / "opened").folder == opened.folder  # the same file once more
    else:
        payload = load_checkpoint(place / "results/r/checkpoints/r_final.pt", pytest.fail)
        for part in ("config", "requested"):
            payload[part] |= wish
            payload[part]["data"] |= {"data": "/etc/passwd"}
        file = tmp_path / "evil.pt"
        save_checkpoint(file, payload, payload["state"]["step"])
        with pytest.raises(ValueError, match="data passwd: this text is on the machine"):
            nl.evaluate(file)
    run = nl.find_run(file, results_dir=tmp_path / "here")
    assert run.record["data"]["name"] in ("wiki", "passwd")
    nl.train(nl.extended(run, epochs=3, data=str(place / "secret" / "wiki")), progress=Progress())
    assert list(obeyed.iterdir()) == []
    assert {found.name for found in (tmp_path / "here").iterdir()} == {"r", ".r.lock"}


@pytest.mark.parametrize("name", ["../../x", "/x", ".."])
def test_a_record_cannot_name_files_outside(place, tmp_path, name):
    """The checkpoints' names begin with the run's, and those are renamed when a run goes on."""
    with zipfile.ZipFile(nl.bundle(place / "results" / "r", tmp_path / "honest.zip")) as archive:
        files = {found: archive.read(found) for found in archive.namelist() if found != "MANIFEST.json"}
    record = json.loads(files["run.json"]) | {"run": name}
    file = write_zip(files | {"run.json": json.dumps(record).encode()}, "r", tmp_path / "evil.zip")
    with pytest.raises(BundleError, match="is no name for a folder"):
        nl.open_bundle(file, tmp_path / "here")
    assert not list((tmp_path / "here").glob("*"))


def test_a_preset_cannot_name_a_folder_outside(place, tmp_path):
    from newllm_lib.runs.folder import run_folder
    from newllm_lib.training.setup import make_setup

    setup = make_setup(tiny_config(place / "secret" / "wiki", preset="../../<b>", results_dir="r"))
    assert str(run_folder(setup)) == f"r/-.-..--b--{setup.identity[:6]}"
    plain = dataclasses.replace(setup, config=setup.config.replace(preset="l4_fp16"))
    assert str(run_folder(plain)) == f"r/l4_fp16-{setup.identity[:6]}"


def test_the_report_of_a_run_is_written_from_its_record(place, tmp_path):
    """Its own is the same to the letter; a stranger's file is not shown."""
    folder = place / "results" / "r"
    assert nl.load(folder).report == (folder / "report.md").read_text().replace("![curves](curves.png)\n\n", "")
    run = nl.open_bundle(hostile_bundle(tmp_path, tmp_path / "hostile.zip"), tmp_path / "here")
    assert "<script" in (run.folder / "report.md").read_text()  # the control
    shown = re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", run.report)  # code is shown as it is
    assert "`" not in shown and "<script" not in shown and "<img" not in shown
    again = words_of(nl.bundle(run, tmp_path / "again.zip"))  # nor is it handed on
    assert "\n<script" not in again
    assert DATA_NAME not in again
