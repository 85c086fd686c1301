"""A file from Google Drive by its id, checked."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from newllm_lib.config.places import user_path
from newllm_lib.errors import ConfigError, DownloadError, MissingPackageError, NetworkError
from newllm_lib.escaping import say
from newllm_lib.system.files import file_error, file_errors, make_folder, sha256_of

STALL_SECONDS = 60.0
"""Without a byte received, after which a download is given up: gdown itself waits for ever."""
_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
_ID = r"[\w-]{15,}"


@file_errors()
def fetch(
    source: str | Path,
    folder: str | Path = "downloads",
    sha256: str | None = None,
    *,
    stall: float = STALL_SECONDS,
    tell: Callable[[str], None] = say,
) -> Path:
    """The file that `source` names, downloaded to `folder/<id>/` where it is on Google Drive, its hash checked.

    source: a file on this machine, the id of a file on Drive that is shared by link, or such a link. sha256: what its
    content must be; None = anything, and the hash is told. A file that is there already is not downloaded again.

    ConfigError when `source` is none of these; DownloadError when Google refuses the file, or the content is another
    one (a download is then deleted); NetworkError without a network, or when nothing is received for `stall` seconds.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256 := sha256.strip().lower()):
        raise ConfigError(f"sha256 = {sha256!r}: must be 64 hex digits")
    if user_path(source).is_file():
        return _checked(user_path(source), sha256)
    file_id = _drive_id(str(source))
    place = Path(folder) / file_id
    for found in sorted(place.glob("*")):
        if sha256 is None or sha256_of(found) == sha256:
            return _checked(found, sha256)
        found.unlink()
    make_folder(place)
    scratch = tempfile.mkdtemp(prefix=f".{file_id}-", dir=folder)
    try:
        downloaded = _download(file_id, Path(scratch), stall)
        _refuse_page(downloaded, file_id)
        _checked(downloaded, sha256)
        target = place / downloaded.name
        os.replace(downloaded, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if sha256 is None:
        tell(f"{target}: sha256 {sha256_of(target)}; give it as sha256 to be sure of the same file next time")
    return target


def _checked(path: Path, sha256: str | None) -> Path:
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise DownloadError(f"{path.name}: sha256 mismatch: expected {sha256}, got {found}")
    return path


def _drive_id(source: str) -> str:
    """The id in a link, or the id itself."""
    url = urlparse(source)
    if url.scheme in ("http", "https") and url.hostname in _HOSTS and "/folders/" not in url.path:
        if found := re.search(rf"/d/({_ID})", url.path) or re.search(rf"(?:^|&)id=({_ID})", url.query):
            return found[1]
    elif re.fullmatch(_ID, source):
        return source
    raise ConfigError(
        f"{source!r}: must be a file on this machine, the id of a file on Google Drive, or a link to one "
        "(https://drive.google.com/file/d/ID/view; not to a folder)"
    )


def _download(file_id: str, scratch: Path, stall: float) -> Path:
    """Let gdown download a file into a folder; the file. In a thread, as a connection that hangs would never end."""
    try:
        import gdown
    except ImportError as error:
        raise MissingPackageError(f"a download from Google Drive needs gdown ({error}): pip install gdown") from error
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(gdown.download(id=file_id, output=f"{scratch}{os.sep}", quiet=True, use_cookies=False))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    received, since = 0, time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        size = sum(path.stat().st_size for path in scratch.iterdir())
        if size != received:
            received, since = size, time.monotonic()
        elif time.monotonic() - since > stall:
            raise NetworkError(
                f"Google Drive, file {file_id}: nothing received for {stall:g} s ({received:,} bytes so far); try again"
            )
    if isinstance(outcome[0], Exception):
        raise _explained(outcome[0], file_id, scratch) from outcome[0]
    if outcome[0] is None:  # as older versions of gdown say that it failed
        raise _refused(file_id, "no reason given")
    return Path(str(outcome[0]))


def _explained(error: Exception, file_id: str, folder: Path) -> Exception:
    """An error of gdown in one message that says what to do."""
    import requests
    from gdown.exceptions import FileURLRetrievalError

    said = " ".join(str(error).split())
    if isinstance(error, (FileURLRetrievalError, requests.HTTPError)):
        return _refused(file_id, said)
    if isinstance(error, requests.RequestException):
        return NetworkError(
            f"Google Drive, file {file_id}: no connection ({type(error).__name__}). Check the network; or download the "
            "file by other means and give its path"
        )
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        return file_error(error, folder.parent, f"cannot write the download to {folder.parent}")
    return NetworkError(f"Google Drive, file {file_id}: the download failed ({type(error).__name__}: {said})")


def _refused(file_id: str, said: str) -> DownloadError:
    return DownloadError(
        f"Google Drive, file {file_id}: refused ({said}). Its owner must share it with 'Anyone with the link'; a file "
        "that many have downloaded is locked for a day: copy it to your own Drive, or download it in a browser and "
        "give its path"
    )


def _refuse_page(path: Path, file_id: str) -> None:
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise _refused(file_id, "a web page came instead of the file")
