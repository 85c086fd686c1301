"""Model folders and bundles: what was packed comes back, and nothing else ever does."""

import hashlib
import json
import math
import os
import struct
import zipfile

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import tiny_config, write_text

from newllm_lib import runs
from newllm_lib.config import ModelConfig
from newllm_lib.config.portable import received
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.errors import BundleError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model
from newllm_lib.reporting.model_card import model_card
from newllm_lib.sharing import bundle as bundle_module
from newllm_lib.sharing.bundle import MANIFEST, bundle, open_bundle
from newllm_lib.sharing.export import export

TOKENS = torch.tensor([[2, 5, 6, 7]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("shared")
    config = tiny_config(write_text(folder / "text"), results_dir=str(folder / "results"), name="small")
    return runs.train(config)


def logits(place):
    return runs.load_model(place).model(TOKENS)[0]


# --- export -----------------------------------------------------------------------------------------------------


def test_an_exported_model_gives_the_same_logits(run, tmp_path):
    export(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "data.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert torch.equal(logits(tmp_path / "out"), run.model(TOKENS)[0])
    assert torch.equal(NewLLM.from_pretrained(tmp_path / "out")(TOKENS)[0], run.model(TOKENS)[0])
    assert runs.load_model(tmp_path / "out").tokenizer == run.tokenizer


def test_half_halves_the_weights_and_hardly_moves_the_logits(run, tmp_path):
    export(run, tmp_path / "half", half=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    found = runs.load_model(tmp_path / "half").model
    assert found.output.weight.dtype == torch.float32
    torch.testing.assert_close(found(TOKENS)[0], run.model(TOKENS)[0], rtol=0, atol=0.02)
    assert not torch.equal(found(TOKENS)[0], run.model(TOKENS)[0])


def test_weights_beyond_fp16_are_named(tmp_path):
    model = NewLLM(ModelConfig(vocab_size=6, hidden_dim=8))
    with torch.no_grad():
        model.layers[1].weight[0, 0] = 1e6
    export_model(tmp_path / "big", model, WordTokenizer(["a", "b"]))
    with pytest.raises(ValueError, match=r"layers.1.weight holds 1e\+06: FP16 ends at 65504; export without half"):
        export(tmp_path / "big", tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    export(run, tmp_path / "out")
    export(run, tmp_path / "out", half=True)  # a model folder is replaced


def test_the_card_is_written_from_the_report(run, tmp_path):
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "newllm_lib"
    assert f"Best validation perplexity **{run.best['val_ppl']:.2f}**" in body
    assert f"{run.config.model.num_parameters:,} parameters" in body
    assert run.record["data"]["fingerprint"] in body
    again = export(tmp_path / "out", tmp_path / "second")  # a card is not lost on the way
    assert (again / "README.md").read_text() == text


def test_the_cards_metadata_hold_the_scores_of_a_text_that_the_hub_has(run):
    """As the hub reads them, with the hub's own class."""
    best = dict(run.record["best"]) | {"val_ppl": 22.34567, "val_accuracy": 0.31}
    record = dict(run.record) | {"best": best, "data": dict(run.record["data"]) | {"name": "wikitext-2"}}
    data = ModelCard(model_card(record, run.config.model)).data
    assert (data.license, data.language, data.library_name) == ("cc-by-sa-3.0", "en", "newllm_lib")
    assert (data.datasets, data.pipeline_tag) == (["Salesforce/wikitext"], "text-generation")
    assert data.model_name == "small"
    assert [(score.metric_type, score.metric_value, score.dataset_split) for score in data.eval_results] == [
        ("perplexity", 22.3457, "validation"),
        ("accuracy", 0.31, "validation"),
    ]
    assert {(score.dataset_type, score.dataset_config) for score in data.eval_results} == {
        ("Salesforce/wikitext", "wikitext-2-v1")
    }
    best["val_ppl"] = math.inf
    data = ModelCard(model_card(record, run.config.model)).data
    assert [score.metric_type for score in data.eval_results] == ["accuracy"]  # YAML has no infinity the hub takes


def test_the_cards_metadata_claim_nothing_for_a_text_of_ones_own(run):
    data = ModelCard(model_card(run.record, run.config.model)).data
    assert (data.license, data.language, data.datasets, data.eval_results) == ("unknown", None, None, None)


def test_save_pretrained_takes_card_and_tokenizer_along(run, tmp_path):
    run.model.save_pretrained(tmp_path / "saved")
    assert f"**{run.best['val_ppl']:.2f}**" in (tmp_path / "saved" / "README.md").read_text()
    assert runs.load_model(tmp_path / "saved").tokenizer == run.tokenizer
    assert torch.equal(NewLLM.from_pretrained(tmp_path / "saved")(TOKENS)[0], run.model(TOKENS)[0])


def test_push_to_hub_sends_weights_card_and_tokenizer(run, monkeypatch):
    sent = {}

    def upload_folder(self, *, folder_path, **rest):
        sent.update({name: os.path.getsize(os.path.join(folder_path, name)) for name in os.listdir(folder_path)})

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **rest: type("R", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    run.model.push_to_hub("someone/small", token="hf_x")
    assert set(sent) == {"README.md", "config.json", "data.json", "model.safetensors", "tokenizer.json"}


# --- bundles ----------------------------------------------------------------------------------------------------


def test_a_bundle_brings_the_run_back(run, tmp_path):
    path = bundle(run, tmp_path / "b.zip")
    opened = open_bundle(path, tmp_path / "elsewhere")
    assert opened.folder == tmp_path / "elsewhere" / "small"
    assert opened.record == received(json.loads(json.dumps(run.record)))
    assert opened.history.equals(run.history)
    assert torch.equal(opened.model(TOKENS)[0], run.model(TOKENS)[0])
    for name in ("curves.png", "report.md"):
        assert (opened.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert [found.name for found in (tmp_path / "elsewhere").iterdir()] == ["small"]


def test_the_same_run_gives_the_same_file_beside_its_folder(run, tmp_path):
    first = bundle(run)
    assert first == run.folder.with_suffix(".zip")
    assert first.read_bytes() == bundle(run, tmp_path / "other.zip").read_bytes()
    first.unlink()


def test_with_its_checkpoint_a_run_goes_on_elsewhere(run, tmp_path):
    opened = open_bundle(bundle(run, tmp_path / "b.zip", checkpoint=True), tmp_path / "elsewhere")
    text = run.config.data.data
    config = tiny_config(text, name="small", results_dir=str(tmp_path / "elsewhere"))
    longer = runs.train(config, epochs=config.train.epochs + 1)
    assert longer.folder == opened.folder
    assert longer.record["step"] > run.record["step"]


def test_opening_twice_is_harmless_and_another_run_is_never_replaced(run, tmp_path):
    path = bundle(run, tmp_path / "b.zip")
    open_bundle(path, tmp_path / "r")
    assert open_bundle(path, tmp_path / "r").folder == tmp_path / "r" / "small"
    (tmp_path / "r" / "small" / "report.md").write_text("changed")
    with pytest.raises(FileExistsError, match=r"small: is there already, with another report.md; give another name"):
        open_bundle(path, tmp_path / "r")
    assert open_bundle(path, tmp_path / "r", name="other").folder == tmp_path / "r" / "other"


def test_a_run_without_weights_makes_no_bundle(run, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text((run.folder / "run.json").read_text())
    with pytest.raises(ValueError, match=r"has no model/model.safetensors yet"):
        bundle(tmp_path / "bare")
    assert not (tmp_path / "bare.zip").exists()


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, hashes=True):
    """A bundle of these members, its manifest made anew unless `hashes` is false."""
    if hashes:
        manifest = json.loads(members[MANIFEST])
        manifest["files"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in members.items()
            if name != MANIFEST
        }
        members = members | {MANIFEST: json.dumps(manifest).encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refused(path, folder, message, **options):
    with pytest.raises(BundleError) as error:
        open_bundle(path, folder, **options)
    assert message in str(error.value)
    assert not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "model/../../evil", "a\\..\\evil", "C:/evil", "a/b/c/d", "model//x", "./x", "x\n"]
)
def test_no_name_leads_out_of_the_folder(run, tmp_path, name):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    refused(
        write_zip(tmp_path / "evil.zip", members | {name: b"x"}), tmp_path / "r", "which is not a plain file inside"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zip", "evil.zip"]


def test_the_same_members_under_plain_names_are_accepted(run, tmp_path):
    """The control of the refusals: rewritten in the same way, with an innocent extra file."""
    members = members_of(bundle(run, tmp_path / "b.zip"))
    opened = open_bundle(write_zip(tmp_path / "fine.zip", members | {"model/notes.txt": b"x"}), tmp_path / "r")
    assert (opened.folder / "model" / "notes.txt").read_bytes() == b"x"


def test_a_link_is_refused(run, tmp_path):
    path = bundle(run, tmp_path / "b.zip")
    members = members_of(path)
    manifest = json.loads(members.pop(MANIFEST))
    manifest["files"]["link"] = {"sha256": hashlib.sha256(b"/etc/passwd").hexdigest(), "bytes": 11}
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
        archive.writestr(MANIFEST, json.dumps(manifest))
    refused(tmp_path / "evil.zip", tmp_path / "r", "which is not a plain file inside")


def test_a_changed_member_is_found(run, tmp_path):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    changed = members | {"report.md": members["report.md"].replace(b"e", b"3", 1)}
    refused(write_zip(tmp_path / "c.zip", changed, hashes=False), tmp_path / "r", "report.md is damaged: its sha256")


def test_members_and_manifest_must_agree(run, tmp_path):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    extra = write_zip(tmp_path / "extra.zip", members | {"extra.txt": b"x"}, hashes=False)
    refused(extra, tmp_path / "r", f"members and {MANIFEST} differ: extra.txt")
    fewer = {name: data for name, data in members.items() if name != "curves.png"}
    refused(write_zip(tmp_path / "fewer.zip", fewer, hashes=False), tmp_path / "r", "differ: curves.png")
    short = {name: data for name, data in members.items() if name != "model/config.json"}
    refused(write_zip(tmp_path / "short.zip", short), tmp_path / "r", "not a whole run, model/config.json is missing")


def test_what_is_too_large_is_refused_before_it_is_unpacked(run, tmp_path):
    path = bundle(run, tmp_path / "b.zip")
    refused(path, tmp_path / "r", "allowed are 1,000", max_bytes=1000)
    members = members_of(path) | {"big": bytes(10**6), "small": b"x"}
    manifest = json.loads(members[MANIFEST])
    entry = {"sha256": "", "bytes": 10**6}
    manifest["files"] |= {"big": entry, "small": entry | {"bytes": -(10**6)}}
    lying = write_zip(tmp_path / "lying.zip", members | {MANIFEST: json.dumps(manifest).encode()}, hashes=False)
    refused(lying, tmp_path / "r", "small is 1 bytes, recorded are -1,000,000", max_bytes=10**6)


def test_a_member_of_another_size_than_recorded_is_refused(run, tmp_path):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    manifest = json.loads(members[MANIFEST])
    manifest["files"]["report.md"]["bytes"] = 10
    lying = members | {MANIFEST: json.dumps(manifest).encode()}
    refused(write_zip(tmp_path / "l.zip", lying, hashes=False), tmp_path / "r", "bytes, recorded are 10")


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_said_to_be_one(run, tmp_path, part):
    data = bundle(run, tmp_path / "b.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: int(len(data) * part)])
    refused(tmp_path / "cut.zip", tmp_path / "r", "not a readable zip file")


def test_flipped_bytes_are_found(run, tmp_path):
    data = bytearray(bundle(run, tmp_path / "b.zip").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "flip.zip").write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "flip.zip", tmp_path / "r")
    assert not any((tmp_path / "r").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "bundle version 2, this library reads up to 1; upgrade it"),
        ({"run": "../evil"}, "'../evil' is no name for a folder"),
        ({"run": ".hidden"}, "'.hidden' is no name for a folder"),
        ({"files": []}, "cannot be read"),
        ({"format_version": "new"}, "cannot be read"),
        ({"files": {"run.json": {"sha256": 7, "bytes": 1}}}, "cannot be read"),
        ({"files": {"run.json": {"sha256": "", "bytes": 1e400}}}, "cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_trusted(run, tmp_path, changes, message):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    manifest = json.loads(members[MANIFEST]) | changes
    path = write_zip(tmp_path / "m.zip", members | {MANIFEST: json.dumps(manifest).encode()}, hashes=False)
    refused(path, tmp_path / "r", message)


def test_other_files_are_no_bundles(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    refused(tmp_path / "text.zip", tmp_path / "r", "not a readable zip file")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    refused(tmp_path / "other.zip", tmp_path / "r", f"not a bundle of newllm_lib (no {MANIFEST} in it)")
    with pytest.raises(FileNotFoundError):
        open_bundle(tmp_path / "none.zip", tmp_path / "r")


def test_weights_that_hash_well_and_cannot_be_read_are_refused(run, tmp_path):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    bad = members | {"model/model.safetensors": struct.pack("<Q", 10**6)}
    refused(
        write_zip(tmp_path / "bad.zip", bad), tmp_path / "r", "its files are whole, but are no run (CheckpointError"
    )
    for name, content in (
        ("model/tokenizer.json", b"[]"),
        ("run.json", json.dumps(run.record | {"best": {"val_loss": 1}}).encode()),
        ("history.csv", b""),
    ):
        path = write_zip(tmp_path / "bad.zip", members | {name: content})
        refused(path, tmp_path / "r", "its files are whole, but are no run")


def test_a_manifest_without_a_name_is_refused(run, tmp_path):
    members = members_of(bundle(run, tmp_path / "b.zip"))
    manifest = json.loads(members[MANIFEST])
    del manifest["run"]
    path = write_zip(tmp_path / "m.zip", members | {MANIFEST: json.dumps(manifest).encode()}, hashes=False)
    refused(path, tmp_path / "r", "cannot be read ('run')")


def test_any_name_that_a_run_may_have_travels(run, tmp_path, monkeypatch):
    config = tiny_config(run.config.data.data, results_dir=str(tmp_path), name="lr=0.001, first @ 50 %")
    named = runs.train(config, epochs=1)
    monkeypatch.chdir(named.folder)
    path = bundle(".", checkpoint=True)
    assert path == tmp_path / "lr=0.001, first @ 50 %.zip"
    assert open_bundle(path, tmp_path / "elsewhere").folder.name == "lr=0.001, first @ 50 %"


def test_a_run_is_not_exported_over_itself(run):
    before = (run.folder / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is where the model comes from"):
        export(run, run.folder / "model", half=True)
    assert (run.folder / "model" / "model.safetensors").read_bytes() == before


def test_a_run_of_infinite_perplexity_can_be_loaded(run, tmp_path):
    folder = open_bundle(bundle(run, tmp_path / "b.zip"), tmp_path / "r").folder
    record = json.loads((folder / "run.json").read_text())
    record["best"]["val_ppl"] = None  # as an infinite one is written
    (folder / "run.json").write_text(json.dumps(record))
    assert "**infinite**" in runs.load_model(folder).model.card


def test_sharing_is_at_the_front_door():
    import newllm_lib as nl

    assert (nl.bundle, nl.open_bundle, nl.export) == (bundle_module.bundle, bundle_module.open_bundle, export)


def test_the_files_of_a_study_as_one_file(tmp_path):
    study = tmp_path / "grid"
    (study / "a run" / "checkpoints").mkdir(parents=True)
    (study / "a run" / "run.json").write_text("{}")
    for name in ("study.json", "table.csv", ".hidden"):
        (study / name).write_text(name)
    path = bundle_module.archive(study)
    assert path == tmp_path / "grid.zip"
    first = path.read_bytes()
    with zipfile.ZipFile(path) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == {
            "grid/study.json": b"study.json", "grid/table.csv": b"table.csv",
        }  # fmt: skip
    assert bundle_module.archive(study).read_bytes() == first  # whenever it is made
    with pytest.raises(ValueError, match="empty: holds no files to take along"):
        (tmp_path / "empty").mkdir()
        bundle_module.archive(tmp_path / "empty")
