"""Where a notebook's results live on Colab and Kaggle: Google Drive where it is wanted, and a download at the end.

Nothing here asks the user anything unless `use_drive` is on, and whatever fails is said and gone on without.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote

from newllm_lib.config.places import user_path
from newllm_lib.errors import ConfigError, FileError, NewLLMError
from newllm_lib.escaping import html_attribute, html_text, say
from newllm_lib.system.console import KAGGLE_OUTPUT, in_colab, in_kaggle, in_kernel
from newllm_lib.system.files import file_errors, make_folder, write_text_atomic

MOUNT_POINT = Path("/content/drive")
DRIVE_FOLDER = "MyDrive/newllm"
MAX_DOWNLOAD_BYTES = 100 << 20
"""Above it a download through the browser is not tried: large ones fail without a word."""
_BUTTON = (
    "display:inline-block;padding:6px 14px;border-radius:4px;background:#1f6fb4;color:#fff;text-decoration:none;"
    "max-width:100%;overflow-wrap:anywhere"
)
_PAGE_SECONDS = 5
"""How long the page has to answer one question."""
_NOT_FLUSHED = "Google Drive was NOT flushed"
_MAY_BE_MISSING = (
    "What was written last may not have reached Google: look at drive.google.com before you end this session."
)


class Storage(NamedTuple):
    """Where a copy of each run is kept."""

    mirror_dir: str | None
    """On Google Drive; None where that is off, or cannot be used."""


def storage(use_drive: bool = False, folder: str = DRIVE_FOLDER) -> Storage:
    """With `use_drive` on Colab, where runs get a verified copy: `folder` of Google Drive; else they are here alone.

    Off, it does and asks nothing. On, it mounts Drive, which asks for permission unless it is mounted already; where
    that fails, for whatever reason or because it is interrupted, a red note says why, and the work continues on this
    machine alone. ConfigError when `folder` is no path such as MyDrive/newllm.
    """
    if not use_drive:
        return Storage(None)
    parts = PurePosixPath(folder).parts
    if parts[:1] not in (("MyDrive",), ("Shareddrives",)) or len(parts) < 2 or ".." in parts:
        raise ConfigError(
            f"folder = {folder!r}: must be a folder below MyDrive or Shareddrives, such as {DRIVE_FOLDER}"
        )
    try:
        place = _mounted() / folder
        make_folder(place)
        _check_writing(place)
    except KeyboardInterrupt:
        _not_used("the mounting was interrupted", "To use Drive, run this cell again and allow the access.")
    except ImportError:
        _not_used("only Colab can mount it", "Elsewhere give a folder of your own as mirror_dir.")
    except NotImplementedError as error:
        _not_used(f"this kind of runtime cannot mount it ({error})", "Take the results with you by the last cell.")
    except Exception as error:  # the browser's part of it has errors of its own
        _not_used(
            _named(error), "To try again: Runtime > Restart session, then Run all, and allow the access when asked."
        )
    else:
        say(f"runs are copied to {place} (Colab sends them on to Google's servers in the background)")
        return Storage(str(place))
    return Storage(None)


def _mounted() -> Path:
    """The mount point, Drive mounted there; mounting what is mounted already asks nothing."""
    from google.colab import drive

    drive.mount(str(MOUNT_POINT))
    if not os.path.ismount(MOUNT_POINT):  # a folder of that name would take everything, and be no Drive
        raise FileError(f"{MOUNT_POINT} is a folder of this machine, not a mounted Drive; move it away")
    return MOUNT_POINT


def _check_writing(place: Path) -> None:
    probe = place / "newllm-test.txt"
    write_text_atomic(probe, "to see whether files can be written here\n")
    probe.unlink()


def flush_drive(minutes: float = 10) -> bool:
    """Wait until Google has everything that was written to Drive, then unmount it; whether that worked.

    For the very end of a session, by hand: afterwards nothing can be copied until Drive is mounted again.
    """
    try:
        from google.colab import drive

        drive.flush_and_unmount(timeout_ms=int(minutes * 60_000))
    except KeyboardInterrupt:
        _warn(_NOT_FLUSHED, f"the waiting was interrupted. {_MAY_BE_MISSING}")
    except ImportError:
        _warn(_NOT_FLUSHED, "only Colab mounts it, so nothing here waits to be sent.")
    except Exception as error:
        _warn(_NOT_FLUSHED, f"{_named(error)}. {_MAY_BE_MISSING}")
    else:
        return True
    return False


def offer_download(path: str | Path) -> None:
    """Offer a file for download: by the browser on Colab, by a button in other notebooks; and say where it lies.

    FileMissingError when there is no such file. A download that fails is said, not raised.
    """
    path = user_path(path)
    with file_errors(path):
        size = path.stat().st_size
    say(f"{path.resolve()} ({size / 2**20:.1f} MiB)")
    if in_colab():
        _download_from_colab(path, size)
        return
    if in_kaggle():
        say(f"what lies in {KAGGLE_OUTPUT} is under Output on the right, and is kept when you choose Save Version")
    if in_kernel() and path.resolve().is_relative_to(Path.cwd()):  # what a notebook's server can link to
        from IPython.display import HTML, display

        place = os.path.relpath(path)
        address = html_attribute(quote(place))  # a file may be called javascript:...
        text = html_text(f"Download {path.name} ({size / 2**20:.1f} MiB)")
        # Lab opens links without `download` as text
        display(HTML(f"<a href='{address}' download style='{_BUTTON}'>{text}</a>"))


def _download_from_colab(path: Path, size: int) -> None:
    by_hand = (
        "take it from the file browser (the folder on the left); to keep runs on Google Drive: USE_DRIVE where the "
        "settings have it, else mirror_dir=nl.storage(use_drive=True).mirror_dir in nl.train"
    )
    if size > MAX_DOWNLOAD_BYTES:
        say(f"too large for a download by the browser; {by_hand}")
        return
    if not _page_answers():
        say("to take it with you: right-click it in the explorer on the left > Download (this page is not Colab's own)")
        return
    try:
        from google.colab import files

        files.download(str(path))
    except Exception as error:
        say(f"the download failed ({type(error).__name__}: {error}); {by_hand}")
    else:
        say(f"your browser downloads it; should nothing arrive, {by_hand}")


def _page_answers() -> bool:
    """Whether Colab's own page shows this notebook; VS Code on a Colab runtime answers nothing."""
    try:
        from google.colab import output

        return output.eval_js("1 + 1", timeout_sec=_PAGE_SECONDS) == 2
    except Exception:  # a time-out, or no page at all
        return False


def _not_used(reason: str, remedy: str) -> None:
    _warn("Google Drive is NOT used", f"{reason}. The work is on this machine only, and lost with it. {remedy}")


def _named(error: Exception) -> str:
    if isinstance(error, NewLLMError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _warn(title: str, text: str) -> None:
    """In red where that can be: what did not go as it was meant to, why, and what to do."""
    if not in_kernel():
        say(f"warning: {title}: {text}", err=True)
        return
    from IPython.display import HTML, display

    style = "border:2px solid #d62828;border-left-width:10px;background:rgba(214,40,40,.12);padding:6px 10px"
    display(HTML(f'<div style="{style}"><b style="color:#d62828">{title}</b>: {html_text(text)}</div>'))
