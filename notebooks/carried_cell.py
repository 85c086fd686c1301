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
imported = sys.modules.get("newllm_lib")
if imported is None or not Path(imported.__file__).is_file():  # or its folder was removed since
    try:
        packed = base64.b85decode("".join(ARCHIVE.split()))
    except ValueError:
        packed = b""
    if hashlib.sha256(packed).hexdigest() != SHA256:
        stop("The library in this notebook is damaged: its sha256 is wrong. Download the notebook again.")
    for name in [name for name in sys.modules if name.partition(".")[0] == "newllm_lib"]:
        del sys.modules[name]
    try:
        carried = tempfile.mkdtemp(prefix="newllm_lib-")
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
            archive.extractall(carried, filter="data")
    except OSError as error:
        stop(f"The library cannot be unpacked into {tempfile.gettempdir()}: {error}. Free some space, or set TMPDIR.")
    owner = os.getpid()  # a forked process must not remove what this one still reads
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(carried, ignore_errors=True))
    sys.path.insert(0, carried)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [carried, os.environ.get("PYTHONPATH", "")])
    )  # subprocesses
elif Path(imported.__file__).parent.parent != Path(globals().get("carried", "")):
    print(
        f"The library in this notebook is not used, because newllm_lib was imported already, from "
        f"{Path(imported.__file__).parent}: restart the kernel to use the one in the notebook."
    )
