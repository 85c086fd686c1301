# @title Set-up: from the checkout, an address, or a wheel; nothing that is installed is replaced
SOURCE = ""  # @param {type:"string"}

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = SOURCE or os.environ.get("NEWLLM_SOURCE", "")
here, drive = Path.cwd(), Path("/content/drive/MyDrive")
checkout = [at for at in (here, *here.parents, here / "newllm_lib") if (at / "newllm_lib" / "__init__.py").is_file()]
newest_last = [sorted(at.glob("newllm_lib-*.whl"), key=os.path.getmtime) for at in (here, drive, drive / "newllm")]
wheels = [wheel for found in newest_last for wheel in found[-1:]]
source, failure = SOURCE or next(map(str, wheels), ""), ""
if checkout:
    sys.path.insert(0, str(checkout[0]))
elif importlib.util.find_spec("newllm_lib"):
    if SOURCE:
        print(
            "SOURCE not used, newllm_lib is here already; to take it anew: %pip uninstall -y newllm_lib, restart, run all"
        )
elif source:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as installed:  # pip may add to what is here, not change it
        found = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
        installed.write(
            "\n".join(line for line in found if re.fullmatch(r"[\w.-]+==\d[\d.]*((a|b|rc|\.\w|\+)[\w.]+)?", line))
        )
        installed.flush()
        pip = [sys.executable, "-m", "pip", "install", "--progress-bar=off", "--constraint", installed.name, source]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = "\n".join(f"  {line}" for line in done.stdout.splitlines() if line.strip())[-1500:]
    failure = f"pip could not install {source}:\n{said}\n\n" if done.returncode else ""
    importlib.invalidate_caches()
if not importlib.util.find_spec("newllm_lib"):
    problem = ModuleNotFoundError(
        f"{failure}newllm_lib is not here. One of these brings it:\n"
        "  - put an address into SOURCE above (git+https://..., a wheel's URL or path), or set NEWLLM_SOURCE\n"
        "  - put a wheel newllm_lib-*.whl beside this notebook, or into MyDrive/newllm of a Drive that is mounted\n"
        "  - open the notebook from a clone of the project\n"
        "Then run all cells again."
    )
    problem._render_traceback_ = lambda: [f"\x1b[31m{problem}\x1b[0m"]  # the message alone, in red
    raise problem

import torch

import newllm_lib as nl

version, home = "unreleased", Path(nl.__file__).parent
with contextlib.suppress(Exception):  # no reason to stop
    version = importlib.metadata.version("newllm_lib") or version
with contextlib.suppress(Exception):  # a checkout speaks for itself, whatever else is installed
    version = re.search(r'version="(.+?)"', (home.parent / "setup.py").read_text("utf-8"))[1]
print(f"newllm_lib {version} from {home}\ntorch {torch.__version__}, Python {sys.version.split()[0]}")
