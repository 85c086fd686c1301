"""Downloads by id: gdown as it is installed, against a server on this machine that answers as Google does.

What Google really answers on a given day is not tested anywhere in this project.
"""

import hashlib
import http.server
import socket
import threading

import pytest
import requests

from newllm_lib.sharing import google_drive
from newllm_lib.sharing.google_drive import fetch

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ID = "1AbCdEfGhIjKlMnOpQrStUvWxYz-0123_"
PAGE = "<!DOCTYPE html><html><head><title>Google Drive</title></head><body>{}</body></html>"
QUOTA = PAGE.format('<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>')
CONFIRM = PAGE.format(
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    f'<input type="hidden" name="id" value="{ID}"><input type="hidden" name="confirm" value="t"></form>'
)


class Google(http.server.ThreadingHTTPServer):
    """Answers every request by `answer`, one of the methods of `Request`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.answer, self.asked, self.content = "file", [], CONTENT
        self.released = threading.Event()


class Request(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        getattr(self, self.server.answer)()

    def send(self, content, kind="application/octet-stream", length=None, status=200, name="best_run.pt"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(content)))
        if name:
            self.send_header("Content-Disposition", f'attachment; filename="{name}"')
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def file(self):
        self.send(self.server.content)

    def odd_name(self):
        self.send(self.server.content, name="../../evil.pt")

    def large_file(self):
        """A page that asks for confirmation comes first."""
        if "confirm=t" in self.path:
            self.file()
        else:
            self.send(CONFIRM.encode(), "text/html; charset=utf-8", name=None)

    def quota(self):
        self.send(QUOTA.encode(), "text/html; charset=utf-8", name=None)

    def sign_in(self):
        self.send(PAGE.format("Sign in").encode(), "text/html; charset=utf-8", name=None)

    def not_found(self):
        self.send(PAGE.format("404").encode(), "text/html; charset=utf-8", name=None, status=404)

    def page_as_file(self):
        self.send(b"\n " + PAGE.format("sorry").encode(), "text/html")

    def cut_off(self):
        self.send(self.server.content[:1000], length=len(self.server.content))
        self.close_connection = True

    def hang(self):
        self.send(self.server.content[:1000], length=len(self.server.content))
        self.server.released.wait(30)


@pytest.fixture
def google(monkeypatch):
    """The server, to which every request to Google goes."""
    server, get = Google(), requests.Session.get
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def to_server(session, url, **options):
        host, path = url.removeprefix("https://").split("/", 1)
        assert host in ("drive.google.com", "drive.usercontent.google.com")
        return get(session, f"http://127.0.0.1:{server.server_port}/{path}", **options)

    monkeypatch.setattr(requests.Session, "get", to_server)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_comes_by_its_id_and_is_checked(google, tmp_path, capsys):
    path = fetch(ID, tmp_path, SHA256)
    assert path == tmp_path / ID / "best_run.pt"
    assert path.read_bytes() == CONTENT
    assert google.asked == [f"/uc?id={ID}"]
    assert left(tmp_path) == [f"{ID}/best_run.pt"]
    assert not list(tmp_path.glob(".*"))
    assert capsys.readouterr().out == ""
    fetch(ID, tmp_path, SHA256.upper() + "\n")
    assert len(google.asked) == 1  # it is there already


def test_without_a_hash_the_hash_is_told(google, tmp_path, capsys):
    path = fetch(ID, tmp_path)
    assert (
        capsys.readouterr().out == f"{path}: sha256 {SHA256}; give it as sha256 to be sure of the same file next time\n"
    )


@pytest.mark.parametrize(
    "link",
    [
        f"https://drive.google.com/file/d/{ID}/view?usp=sharing",
        f"https://drive.google.com/open?id={ID}",
        f"https://drive.google.com/uc?export=download&id={ID}",
        f"https://drive.usercontent.google.com/download?id={ID}&export=download&confirm=t",
    ],
)
def test_links_as_google_gives_them(google, tmp_path, link):
    assert fetch(link, tmp_path, SHA256) == tmp_path / ID / "best_run.pt"
    assert google.asked == [f"/uc?id={ID}"]


def test_a_large_file_is_confirmed(google, tmp_path):
    google.answer = "large_file"
    assert fetch(ID, tmp_path, SHA256).read_bytes() == CONTENT
    assert len(google.asked) == 2


def test_a_file_on_this_machine_is_only_checked(tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(CONTENT)
    assert fetch(path, tmp_path / "none", SHA256) == fetch(str(path)) == path
    with pytest.raises(ValueError, match=f"mine.zip: sha256 mismatch: expected {'0' * 64}, got {SHA256}"):
        fetch(path, sha256="0" * 64)
    assert path.exists()
    assert not (tmp_path / "none").exists()


def test_another_content_is_deleted_and_both_hashes_are_told(google, tmp_path):
    google.content = CONTENT[:-1]
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(ValueError, match=rf"best_run\.pt: sha256 mismatch: expected {SHA256}, got {found}"):
        fetch(ID, tmp_path, SHA256)
    assert left(tmp_path) == []
    google.content = CONTENT
    assert fetch(ID, tmp_path, SHA256).read_bytes() == CONTENT


def test_a_file_that_is_there_but_another_one_is_replaced(google, tmp_path):
    (tmp_path / ID).mkdir()
    (tmp_path / ID / "best_run.pt").write_bytes(b"half of an earlier one")
    assert fetch(ID, tmp_path, SHA256).read_bytes() == CONTENT


def test_a_name_from_outside_cannot_leave_the_folder(google, tmp_path):
    google.answer = "odd_name"
    path = fetch(ID, tmp_path / "downloads")
    assert path.parent == tmp_path / "downloads" / ID
    assert left(tmp_path) == [f"downloads/{ID}/{path.name}"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("quota", "Too many users have viewed or downloaded this file recently"),
        ("sign_in", "refused"),
        ("not_found", "refused"),
        ("page_as_file", "a web page came instead of the file"),
    ],
)
def test_what_google_refuses_is_said_with_what_to_do(google, tmp_path, answer, reason):
    google.answer = answer
    with pytest.raises(ValueError, match=reason) as failed:
        fetch(ID, tmp_path)
    message = str(failed.value)
    assert message.startswith(f"Google Drive, file {ID}: refused (")
    assert "'Anyone with the link'" in message
    assert "\n" not in message
    assert left(tmp_path) == []


def test_a_download_that_is_cut_off_is_never_taken_for_whole(google, tmp_path):
    """Newer versions of gdown notice; for older ones the hash does."""
    google.answer = "cut_off"
    with pytest.raises((ValueError, ConnectionError), match=r"the download failed|no connection|sha256 mismatch"):
        fetch(ID, tmp_path, SHA256)
    assert left(tmp_path) == []


def test_a_connection_that_hangs_is_given_up(google, tmp_path):
    google.answer = "hang"
    with pytest.raises(ConnectionError, match=r"nothing received for 0\.5 s \([\d,]+ bytes so far\); try again"):
        fetch(ID, tmp_path, stall=0.5)
    assert left(tmp_path) == []


def test_without_a_network_it_says_so_at_once(tmp_path, monkeypatch):
    def no_names(*_args, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(ConnectionError, match=rf"Google Drive, file {ID}: no connection .*download the file by other"):
        fetch(ID, tmp_path)
    assert left(tmp_path) == []


def test_a_full_disk_is_no_fault_of_the_network(google, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.move", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        fetch(ID, tmp_path)


def test_an_older_gdown_that_returns_nothing_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("gdown.download", lambda **options: None)
    with pytest.raises(ValueError, match=r"refused \(no reason given\)"):
        fetch(ID, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "nowhere/best.pt",
        "short-id",
        "https://example.org/best.pt",
        f"https://example.org/file/d/{ID}/view",
        f"https://drive.google.com/drive/folders/{ID}",
        "https://drive.google.com/file/d//view",
        "",
    ],
)
def test_anything_else_is_no_source(tmp_path, source):
    with pytest.raises(ValueError, match="must be a file on this machine, the id of a file on Google Drive, or a link"):
        fetch(source, tmp_path)
    assert left(tmp_path) == []


def test_a_hash_is_64_digits(tmp_path):
    with pytest.raises(ValueError, match="sha256 = 'abc': must be 64 hex digits"):
        fetch(ID, tmp_path, "abc")


def test_no_version_of_gdown_is_asked_for_what_another_does_not_know(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("gdown.download", lambda **options: asked.update(options))
    with pytest.raises(ValueError, match="refused"):
        fetch(ID, tmp_path)
    assert asked.keys() == {"id", "output", "quiet", "use_cookies"}  # in 5.2 and in 6.x alike
    assert google_drive.STALL_SECONDS == 60
