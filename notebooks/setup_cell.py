# @title Set-up: find New-LLM's library and check that this machine can run it
SOURCE = ""  # @param {type:"string"}
LOOK_IN_DRIVE = False  # @param {type:"boolean"}

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDS = [
    "torch>=2.10", "numpy>=2.0", "datasets>=4.0", "pandas>=2.2", "matplotlib>=3.10", "tqdm>=4.67",
    "safetensors>=0.5", "huggingface_hub>=1.0", "click>=8.1", "sentencepiece>=0.2", "ipywidgets>=7.7",
    "gdown>=5.2", "filelock>=3.32",
]  # fmt: skip
red = "\x1b[31m{}\x1b[0m".format
shell = globals().get("get_ipython", lambda: None)()


def stop(message):  # the message alone, in red; the cells below, which miss a name, show one line each
    problem = ModuleNotFoundError(message)
    problem._render_traceback_ = lambda: [red(problem)]
    later = "newllm_lib is not here: run the set-up cell at the top of this notebook first."
    if shell:
        shell.set_custom_exc((NameError,), lambda *error, **more: print(red(later)))
    raise problem


def unfit(needs, absent_too):  # what is too old here, or absent, in words
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement
        except ImportError:
            stop("The package 'packaging' is not here: run %pip install packaging, then run all cells again.")

    found = []
    for need in map(Requirement, needs):
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found += [f"{need} (it is not here)"] * absent_too
            continue
        if not need.specifier.contains(version, prereleases=True):
            found.append(f"{need} ({version} is here)")
    return found


def check(absent_too=False):
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        stop(f"newllm_lib needs Python 3.11 to 3.13; this is Python {sys.version.split()[0]}.")
    found = unfit(NEEDS, absent_too)
    if found:
        on_colab = (
            "choose the latest runtime version in Runtime > Change runtime type (not a TPU), then run all cells again"
        )
        install = "install " + " ".join(f"'{text.partition(' (')[0]}'" for text in found) + " with pip, then restart"
        remedy = on_colab if "google.colab" in sys.modules else install
        stop(f"newllm_lib cannot run in this runtime, because it needs {', '.join(found)}: {remedy}.")


# <- where the library comes from
STAMP = ""
PROJECT = (
    r"https://github\.com/(?P<owner>\w[\w-]*)/(?P<repository>\w[\w.-]*)/blob/(?!\S*(\.\.|//|/\.))(?P<reference>\w[\w./-]*)/notebooks/"
    r"(00_quickstart|01_train_wikitext2|02_continue_training|03_larger_model|04_fp16_vs_fp32|05_learning_rate_scaling"
    r"|06_compare_runs)\.ipynb"
)


def opened_from(seconds=5):  # the project on GitHub from which Colab opened this notebook, for pip; "" where unknown
    import json
    import threading
    from urllib.parse import unquote
    from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

    paths = []

    class Stay(HTTPRedirectHandler):  # the kernel's own server answers itself, or not at all
        def redirect_request(self, *request):
            return None

    def ask():
        with contextlib.suppress(Exception):  # there are other ways to get the library
            from ipykernel import get_connection_file

            kernel = Path(get_connection_file()).stem.removeprefix("kernel-")
            sessions = "http://{COLAB_JUPYTER_IP}:{KMP_TARGET_PORT}/api/sessions".format_map(os.environ)
            with build_opener(ProxyHandler({}), Stay).open(sessions, timeout=seconds) as answer:
                entries = json.loads(answer.read(1 << 20))
            paths.extend(unquote(at["path"]).removeprefix("fileId=") for at in entries if at["kernel"]["id"] == kernel)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    place = paths[0] if paths else ""
    found = re.fullmatch(PROJECT, place, re.ASCII) if len(place) <= 500 else None
    if place.startswith("https://github.com/") and not found:
        print(f"The library is not installed from {place[:100]!r}, because that is no usable address of the project.")
    return "git+https://github.com/{owner}/{repository}@{reference}".format_map(found.groupdict()) if found else ""


check()
SOURCE = SOURCE or os.environ.get("NEWLLM_SOURCE", "")
if LOOK_IN_DRIVE:  # for a wheel; Google asks for permission
    try:
        from google.colab import drive as google_drive

        google_drive.mount("/content/drive")
    except (Exception, KeyboardInterrupt) as error:
        print(f"Google Drive is not used, because it could not be mounted: {type(error).__name__}: {error}")
here, drive = Path.cwd(), Path("/content/drive/MyDrive")
checkout = [at for at in (here, *here.parents, here / "newllm_lib") if (at / "newllm_lib" / "__init__.py").is_file()]
newest_last = [sorted(at.glob("newllm_lib-*.whl"), key=os.path.getmtime) for at in (here, drive, drive / "newllm")]
newest_last.append(sorted(Path("/kaggle/input").rglob("newllm_lib-*.whl"), key=os.path.getmtime))
wheels = [wheel for found in newest_last for wheel in found[-1:]]
source, failure = SOURCE or next(map(str, wheels), STAMP), ""
if not (source or checkout or importlib.util.find_spec("newllm_lib")):
    source = opened_from()
    if source:
        print(f"installing from {source}, where this notebook was opened")
if checkout:
    sys.path.insert(0, str(checkout[0]))
elif importlib.util.find_spec("newllm_lib"):
    if SOURCE:
        print(
            "SOURCE is not used, because newllm_lib is installed already. To install it again: "
            "%pip uninstall -y newllm_lib, restart, run all cells."
        )
elif source:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as installed:  # pip may add to what is here, not change it
        found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
        installed.write(
            "\n".join(line for line in found if re.fullmatch(r"[\w.-]+==\d[\d.]*((a|b|rc|\.\w|\+)[\w.]+)?", line))
        )
        installed.flush()
        pip = [sys.executable, "-m", "pip", "install", "--no-input", "--progress-bar=off"]
        pip += ["--constraint", installed.name, source]
        unasked = os.environ | {"GIT_TERMINAL_PROMPT": "0"}  # no question, which nobody would see
        done = subprocess.run(
            pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=unasked, check=False
        )
    said = "\n".join(f"  {line}" for line in done.stdout.splitlines() if line.strip())[-1500:]
    failure = f"pip could not install {source}:\n{said}\n\n" if done.returncode else ""
    importlib.invalidate_caches()
if not importlib.util.find_spec("newllm_lib"):
    stop(
        f"{failure}newllm_lib is not here. Do one of these, then run all cells again:\n"
        "  - take the standalone notebook (`make notebooks` builds it), which carries the library\n"
        "  - put an address into SOURCE (git+https://..., a wheel's URL or path) at the top of this cell, or set\n"
        "    NEWLLM_SOURCE; where the cell is folded, click its three dots, or its title, to open it\n"
        "  - put a wheel newllm_lib-*.whl beside this notebook, or into MyDrive/newllm and tick LOOK_IN_DRIVE\n"
        "  - open the notebook from a clone of the project"
    )
# ->

os.environ["NEWLLM_NOTEBOOK_GPU"] = ""  # what this notebook's metadata ask for, to compare with what came

import torch

import newllm_lib as nl

if shell:
    shell.set_custom_exc((), None)
version = getattr(nl, "__version__", "unreleased")
print(
    f"newllm_lib {version} from {Path(nl.__file__).parent}\ntorch {torch.__version__}, Python {sys.version.split()[0]}"
)
