# In notebooks that carry the library: tidy.py puts this in place of what setup_cell.py has between its two arrows.
import atexit
import base64
import hashlib
import io
import shutil
import tarfile

ARCHIVE = """
"""
SHA256 = ""

check(absent_too=True)
if "newllm_lib" not in sys.modules:
    packed = base64.b85decode("".join(ARCHIVE.split()))
    if hashlib.sha256(packed).hexdigest() != SHA256:
        stop("The library in this notebook is damaged: its sha256 is wrong. Download the notebook again.")
    carried = tempfile.mkdtemp(prefix="newllm_lib-")
    atexit.register(shutil.rmtree, carried, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        archive.extractall(carried, filter="data")
    sys.path.insert(0, carried)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [carried, os.environ.get("PYTHONPATH", "")])
    )  # subprocesses
