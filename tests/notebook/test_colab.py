"""Drive, downloads and the line of safety: every way they can go, on a stand-in of `google.colab`."""

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import google_colab_stand_in as stand_in
import IPython
import IPython.display
import pytest
from IPython.display import HTML
from tiny import Quiet, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.notebook import colab
from newllm_lib.reporting import curves, notebook_progress
from newllm_lib.reporting.notebook_page import View, page
from newllm_lib.reporting.notebook_progress import NotebookProgress
from newllm_lib.reporting.sync_status import SyncStatus, unsaved
from newllm_lib.system import hardware


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """Neither Colab nor Kaggle nor a notebook, in an empty folder."""
    for name in [name for name in sys.modules if name == "google" or name.startswith("google.colab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "content" / "drive")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def on_colab(monkeypatch):
    """Colab, Drive not mounted yet."""
    for name in ("google", *(f"google.colab{part}" for part in ("", ".drive", ".files", ".output"))):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is installed is taken back afterwards
    installed = stand_in.install()
    is_mount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in installed.drive.mounted or is_mount(path))
    return installed


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: this is a notebook."""
    displayed = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", displayed.append)
    return displayed


MIRROR = "content/drive/MyDrive/newllm"

# --- Drive ------------------------------------------------------------------------------------------------------


def test_drive_is_off_unless_asked_for(on_colab, capsys):
    assert nl.storage() == (None,)
    assert (on_colab.drive.prompts, capsys.readouterr().out) == (0, "")
    assert not colab.MOUNT_POINT.exists()


def test_drive_is_mounted_once_and_used(on_colab, tmp_path, capsys):
    place = str(tmp_path / MIRROR)
    assert nl.storage(use_drive=True) == (place,)
    assert os.listdir(place) == []
    assert f"runs are copied to {place}" in capsys.readouterr().out
    assert nl.storage(use_drive=True).mirror_dir == place  # Run all once more
    assert on_colab.drive.prompts == 1


def test_a_folder_of_a_shared_drive_can_be_named(on_colab, tmp_path):
    assert nl.storage(True, "Shareddrives/lab/runs").mirror_dir == str(tmp_path / "content/drive/Shareddrives/lab/runs")
    for folder in ("MyDrive", "newllm", "/content/drive/MyDrive/x", "MyDrive/../x", ""):
        with pytest.raises(ValueError, match="must be a folder below MyDrive or Shareddrives"):
            nl.storage(True, folder)


FAILURES = {
    "refused": (ValueError("mount failed"), "ValueError: mount failed"),
    "credentials": (stand_in.MessageError("Error: credential propagation was unsuccessful"), "credential propagation"),
    "time": (ValueError("mount failed: timed out"), "timed out"),
    "interrupted": (KeyboardInterrupt(), "the mounting was interrupted"),
    "not connected": (OSError(107, "Transport endpoint is not connected"), "Transport endpoint is not connected"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_where_mounting_fails_the_work_goes_on_here_and_a_red_note_says_why(on_colab, shown, failure):
    on_colab.drive.failure, reason = FAILURES[failure]
    assert nl.storage(use_drive=True) == (None,)
    (banner,) = shown
    assert isinstance(banner, HTML)
    assert "Google Drive is NOT used" in banner.data
    assert reason in banner.data
    assert "this machine only" in banner.data
    assert "#d62828" in banner.data


def test_outside_a_notebook_the_note_is_a_line(on_colab, capsys):
    on_colab.drive.failure = ValueError("mount failed")
    assert nl.storage(use_drive=True).mirror_dir is None
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: Google Drive is NOT used: ValueError: mount failed. The work is on this")
    assert printed.out == ""


def test_a_note_shows_text_as_text(on_colab, shown):
    on_colab.drive.failure = ValueError("<script>alert(1)</script>")
    nl.storage(use_drive=True)
    assert "&lt;script&gt;" in shown[0].data
    assert "<script>" not in shown[0].data


def test_where_drive_cannot_be_mounted_at_all(on_colab, shown):
    on_colab.drive.environment = stand_in.ENTERPRISE
    assert nl.storage(use_drive=True).mirror_dir is None
    assert "this kind of runtime cannot mount it" in shown[0].data


def test_outside_colab_drive_is_named_as_colabs(shown):
    assert nl.storage(use_drive=True) == (None,)
    assert "only Colab can mount it. The work is on this machine only" in shown[0].data
    assert "mirror_dir" in shown[0].data


def _a_file(place):
    place.parent.mkdir()
    place.write_text("")


def _with_files(place):
    (place / "MyDrive").mkdir(parents=True)
    (place / "MyDrive" / "notes.txt").write_text("written before Drive was mounted")


def _a_link(place):
    place.parent.mkdir()
    (place.parent / "elsewhere").mkdir()
    place.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (_a_file, "must either be a directory or not exist"),
        (_with_files, "must not already contain files"),
        (_a_link, "must not be a symlink"),
    ],
)
def test_an_obstacle_at_the_mount_point_is_named(on_colab, shown, obstacle, reason):
    obstacle(colab.MOUNT_POINT)
    assert nl.storage(use_drive=True).mirror_dir is None
    assert reason in shown[0].data


def test_a_mount_point_with_a_space_is_named(on_colab, shown, monkeypatch, tmp_path):
    monkeypatch.setattr(colab, "MOUNT_POINT", tmp_path / "my drive")
    assert nl.storage(use_drive=True).mirror_dir is None
    assert "must not contain a space" in shown[0].data


def test_a_folder_that_only_looks_mounted_is_not_taken_for_drive(on_colab, shown):
    _with_files(colab.MOUNT_POINT)
    on_colab.drive.mount = lambda mountpoint: print("Drive already mounted")  # taken in by the folder's name
    assert nl.storage(use_drive=True).mirror_dir is None
    assert "is a folder of this machine, not a mounted Drive" in shown[0].data


def test_a_drive_that_cannot_be_written_to_is_named(on_colab, shown):
    nl.storage(use_drive=True)
    folder = Path(MIRROR)
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    assert nl.storage(use_drive=True).mirror_dir is None
    assert f"{folder}: File exists (another name is needed, or move that away)" in shown[0].data


def test_flushing_is_by_hand_and_tells_whether_it_worked(on_colab, shown, capsys):
    assert nl.flush_drive()  # nothing is mounted: nothing to do
    nl.storage(use_drive=True)
    on_colab.drive.failure = ValueError("flush_and_unmount failed")
    assert not nl.flush_drive()
    assert "Google Drive was NOT flushed</b>: ValueError: flush_and_unmount failed. What was written last may not" in (
        shown[0].data
    )
    on_colab.drive.failure = KeyboardInterrupt()
    assert not nl.flush_drive()
    assert "the waiting was interrupted" in shown[1].data
    on_colab.drive.failure = None
    assert nl.flush_drive(minutes=2)
    assert on_colab.drive.flushed == [120_000]
    on_colab.drive.environment = stand_in.ENTERPRISE
    assert not nl.flush_drive()
    for banner in shown:  # Drive is used, and holds nearly everything
        assert "NOT used" not in banner.data
        assert "this machine only" not in banner.data


def test_outside_colab_there_is_nothing_to_flush(capsys):
    assert not nl.flush_drive()
    assert capsys.readouterr().err == (
        "warning: Google Drive was NOT flushed: only Colab mounts it, so nothing here waits to be sent.\n"
    )


# --- the download -----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    path = tmp_path / "results" / "run.zip"
    path.parent.mkdir()
    path.write_bytes(bytes(1 << 20))
    return path


def test_on_colab_the_browser_downloads_it(on_colab, bundle, capsys):
    nl.offer_download(bundle)
    assert on_colab.files.downloaded == [str(bundle)]
    said = capsys.readouterr().out
    assert said.startswith(f"{bundle} (1.0 MiB)\n")
    assert "should nothing arrive, take it from the file browser" in said
    assert "USE_DRIVE where the settings have it, else mirror_dir=nl.storage(use_drive=True).mirror_dir" in said


@pytest.mark.parametrize("failure", [TimeoutError("no answer"), stand_in.MessageError("no page")])
def test_where_no_page_of_colab_answers_no_download_is_promised(on_colab, bundle, capsys, failure):
    """VS Code with Colab's extension: the module is there, and nothing arrives."""
    on_colab.output.failure = failure
    nl.offer_download(bundle)
    assert on_colab.files.downloaded == []
    assert on_colab.output.asked == [5]  # once, and not for ever
    said = capsys.readouterr().out
    assert "right-click it in the explorer on the left > Download" in said
    assert "your browser downloads it" not in said


def test_the_field_that_a_failed_download_names_is_in_the_notebooks(repository):
    sources = [path.read_text(encoding="utf-8") for path in (repository / "notebooks").glob("*.ipynb")]
    assert sum("USE_DRIVE = False" in source for source in sources) >= 4


def test_a_large_file_is_pointed_to_instead(on_colab, bundle, capsys):
    os.truncate(bundle, (100 << 20) + 1)
    nl.offer_download(bundle)
    assert on_colab.files.downloaded == []
    assert "too large for a download by the browser; take it from the file browser" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [stand_in.MessageError("the browser is gone"), OSError("no connection")])
def test_a_download_that_fails_is_said(on_colab, bundle, capsys, failure):
    on_colab.files.failure = failure
    nl.offer_download(bundle)
    said = capsys.readouterr().out
    assert f"the download failed ({type(failure).__name__}: {failure}); take it from the file browser" in said
    assert str(bundle) in said


def test_in_a_notebook_it_is_a_button(bundle, shown, capsys):
    nl.offer_download("results/run.zip")
    (link,) = shown
    assert isinstance(link, HTML)
    start, text = link._repr_html_().split(">", 1)
    assert start.startswith("<a href='results/run.zip' download style='display:inline-block")
    assert text == "Download run.zip (1.0 MiB)</a>"
    assert str(bundle) in capsys.readouterr().out


def test_what_the_notebooks_server_cannot_reach_is_named_only(shown, tmp_path, monkeypatch, bundle, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    nl.offer_download(bundle)
    assert shown == []
    assert capsys.readouterr().out == f"{bundle} (1.0 MiB)\n"


def test_on_kaggle_it_says_how_output_is_kept(bundle, shown, capsys, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    nl.offer_download(bundle)
    assert "kept when you choose Save Version" in capsys.readouterr().out
    assert len(shown) == 1


def test_a_missing_file_is_an_error(on_colab, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.zip"):
        nl.offer_download(tmp_path / "nothing.zip")


def test_nothing_ever_asks_for_an_upload(repository):
    sources = [
        path.read_text(encoding="utf-8")
        for path in (repository / "newllm_lib").rglob("*.py")
        if path.parent.name != "cli"
    ]
    sources += [path.read_text(encoding="utf-8") for path in (repository / "notebooks").glob("*.ipynb")]
    assert len(sources) > 50
    asks = re.compile(r"files\.upload\(|(?<![\w.])input\(|unassign\(")
    assert not any(asks.search(source) for source in sources)
    assert asks.search("name = input('?')")
    with pytest.raises(AssertionError):  # the stand-in would tell
        stand_in.Files().upload()


# --- the line of safety -----------------------------------------------------------------------------------------


def test_where_the_machine_goes_away_the_page_says_so(on_colab, monkeypatch):
    assert unsaved().text == "only on this machine, which Colab deletes when the runtime ends"
    assert "your work: only on this machine, which Colab deletes" in page(View(safety=unsaved()))


def test_on_kaggle_it_says_what_is_kept(monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert "Kaggle keeps /kaggle/working when you choose Save Version" in unsaved().text


def test_elsewhere_it_says_nothing():
    assert unsaved() is None
    assert "your work" not in page(View())


def test_trouble_stands_out():
    trouble = page(View(safety=SyncStatus("ENOSPC", "NOT synced: <full>", False)))
    assert "\N{WARNING SIGN}" in trouble
    assert "your work: NOT synced: &lt;full&gt;" in trouble
    assert "\N{WARNING SIGN}" not in page(View(safety=SyncStatus("synced", "synced 2 minutes ago (step 5)")))


@pytest.fixture
def pages(monkeypatch):
    """Every page that a live display shows."""
    shown = []

    class Handle:
        def update(self, data, *, raw):
            shown.append(data["text/html"])

    def display(data, *, raw, display_id):
        shown.append(data["text/html"])
        return Handle()

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_the_live_page_shows_the_line_at_every_update(pages):
    course = iter([SyncStatus("copying", "copying"), SyncStatus("synced", "synced 1 minute ago (step 5)")])
    progress = NotebookProgress(clock=iter(range(0, 1000, 10)).__next__)
    progress.watch(course.__next__)
    progress.message("one")
    progress.message("two")
    assert ["your work: copying" in pages[0], "your work: synced 1 minute ago" in pages[1]] == [True, True]


def test_where_the_live_page_fails_the_lines_tell_it(pages, monkeypatch, capsys):
    progress = NotebookProgress()
    progress.watch(lambda: SyncStatus("ENOSPC", "NOT synced: full", False))
    monkeypatch.setattr(notebook_progress, "page", lambda view: 1 / 0)
    progress.message("one")
    progress.step(1, 10, 0.1, 3.0, 100.0)
    assert "warning: copy: NOT synced: full" in capsys.readouterr().out


def test_a_run_on_colab_is_taken_up_by_the_next_machine(on_colab, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "write_curves", lambda *args: None)
    config = tiny_config(write_text(tmp_path / "text"), name="r", max_steps=3)
    nl.train(config, progress=NotebookProgress(), **nl.storage()._asdict())
    assert "your work: only on this machine, which Colab deletes when the runtime ends" in pages[-1]
    nl.train(
        config, progress=NotebookProgress(), **nl.storage(use_drive=True)._asdict()
    )  # finished, but not copied yet
    assert "MyDrive/newllm/r: complete and verified (step 3)" in pages[-1]
    shutil.rmtree("results")
    run = nl.train(config, progress=NotebookProgress(), max_steps=6, **nl.storage(use_drive=True)._asdict())
    assert run.record["step"] == 6
    assert f"brought back from {tmp_path / MIRROR / 'r'}: step 3" in pages[-1]
    assert "your work: complete and verified (step 6)" in pages[-1]
    assert on_colab.drive.prompts == 1


# --- the GPU that came --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "came", "told"),
    [
        ("T4", "Tesla T4", ""),
        ("L4", "NVIDIA L4", ""),
        ("A100", "NVIDIA A100-SXM4-40GB", ""),
        ("G4", "NVIDIA RTX PRO 6000 Blackwell Server Edition", ""),
        ("", "AMD EPYC", ""),
        ("T4", "NVIDIA L4", "; this notebook asks for a GPU of type T4 (Runtime > Change runtime type)"),
        ("L4", "NVIDIA L40S", "; this notebook asks for a GPU of type L4 (Runtime > Change runtime type)"),
        ("H100", "NVIDIA RTX PRO 6000", "; this notebook asks for a GPU of type H100 (Runtime > Change runtime type)"),
        ("T4", "Intel(R) Xeon(R)", "; this notebook asks for a GPU of type T4 (Runtime > Change runtime type)"),
    ],
)
def test_the_plan_tells_a_gpu_that_was_not_asked_for(on_colab, monkeypatch, tmp_path, asked, came, told):
    monkeypatch.setenv("NEWLLM_NOTEBOOK_GPU", asked)
    monkeypatch.setattr(hardware, "cpu_name", lambda: came)
    _, lines = nl.plan(tiny_config(write_text(tmp_path / "text"), threads=1))
    assert dict(lines)["device"] == f"{came} (cpu, 1 thread){told}"


def test_elsewhere_no_notebook_asks_for_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_NOTEBOOK_GPU", "T4")
    monkeypatch.setattr(hardware, "cpu_name", lambda: "Some CPU")
    _, lines = nl.plan(tiny_config(write_text(tmp_path / "text"), threads=1))
    assert dict(lines)["device"] == "Some CPU (cpu, 1 thread)"


@pytest.mark.slow
def test_plan_and_report_tell_on_what_a_run_began(monkeypatch, tmp_path):
    config = tiny_config(write_text(tmp_path / "text"), name="r", threads=1)
    for steps, came, told in ((3, "First", ""), (6, "Second", "; the run began on First"), (9, "First", "")):
        monkeypatch.setattr(hardware, "cpu_name", lambda came=came: came)
        expected = f"{came} (cpu, 1 thread){told}"
        config = config.replace(max_steps=steps)
        assert dict(nl.plan(config)[1])["device"] == expected
        run = nl.train(config, progress=Quiet())
        assert dict(run.record["plan"])["device"] == expected
        assert f"| device | {expected} |" in (run.folder / "report.md").read_text()
