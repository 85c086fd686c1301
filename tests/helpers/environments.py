"""Environments in which everything is installed but the library."""

import subprocess
from pathlib import Path


def bare_python(folder, python):
    """The interpreter of a new environment in `folder` with all packages of `python`'s but the library, by links."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    listed = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    purelib = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.strip()
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(purelib).iterdir():
        if "newllm" not in entry.name and not entry.name.endswith(".pth"):
            (packages / entry.name).symlink_to(entry)
    site = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    (site / "others.pth").write_text(f"{packages}\n")
    return str(folder / "venv" / "bin" / "python")
