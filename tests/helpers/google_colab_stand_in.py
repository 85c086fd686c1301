"""Stands in for `google.colab`: the functions that the library calls, as they are called, and the ways they fail.

`install` makes `import google.colab` work in this process, also in a notebook's kernel. Written after the public
source of mid-2026; whether Google's own behaves so on a given day is not tested anywhere in this project.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

COLAB, ENTERPRISE = "hosted Colab", "Colab Enterprise"


class MessageError(Exception):
    """What the browser's side answers, under its real name."""


@dataclass
class Drive:
    """`google.colab.drive`: what it is asked, and what it is to do."""

    environment: str = COLAB
    failure: BaseException | None = None
    """Raised where the user would be asked for permission."""
    prompts: int = 0
    """How often the user was asked."""
    mounted: set[str] = field(default_factory=set)
    flushed: list[int] = field(default_factory=list)
    """The time-outs (ms) of the flushes that went well."""

    def mount(self, mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
        """Ask for permission and mount, unless that is done."""
        self._check_environment()
        if " " in mountpoint:
            raise ValueError("Mountpoint must not contain a space.")
        if mountpoint in self.mounted and not force_remount:
            print(f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount(...)")
            return
        if os.path.islink(mountpoint):
            raise ValueError("Mountpoint must not be a symlink")
        if os.path.isdir(mountpoint) and os.listdir(mountpoint):
            raise ValueError("Mountpoint must not already contain files")
        if os.path.exists(mountpoint) and not os.path.isdir(mountpoint):
            raise ValueError("Mountpoint must either be a directory or not exist")
        self.prompts += 1
        if self.failure:
            raise self.failure
        (Path(mountpoint) / "MyDrive").mkdir(parents=True)
        self.mounted.add(mountpoint)
        print(f"Mounted at {mountpoint}")

    def flush_and_unmount(self, timeout_ms=24 * 60 * 60 * 1000):
        """Send everything on and unmount."""
        self._check_environment()
        if not self.mounted:
            print("Drive not mounted, so nothing to flush and unmount.")
            return
        if self.failure:
            raise self.failure
        self.flushed.append(timeout_ms)
        self.mounted.clear()

    def _check_environment(self):
        if self.environment != COLAB:
            raise NotImplementedError("Mounting drive is unsupported in this environment.")


@dataclass
class Files:
    """`google.colab.files`."""

    failure: Exception | None = None
    downloaded: list[str] = field(default_factory=list)

    def download(self, filename):
        """Start a download by the browser; the real one returns before the user has the file."""
        if not os.path.exists(filename):
            raise FileNotFoundError(f"Cannot find file: {filename}")
        if self.failure:
            raise self.failure
        self.downloaded.append(filename)

    def upload(self, target_dir=""):
        """Would block until the user chooses a file: nothing may call it."""
        raise AssertionError("files.upload blocks a notebook that runs from top to bottom")


@dataclass
class Output:
    """`google.colab.output`."""

    cleared: int = 0
    asked: list[float] = field(default_factory=list)
    """The time limits (s) of the questions to the page."""
    failure: Exception | None = None
    """Raised where no page of Colab's answers."""

    def eval_js(self, script, ignore_result=False, timeout_sec=None):
        """What a script gives in the page; waits for ever without a time limit."""
        self.asked.append(timeout_sec)
        if self.failure:
            raise self.failure
        return {"1 + 1": 2}[script]

    def clear(self, wait=False, output_tags=()):
        """Remove what the cell has shown."""
        self.cleared += 1


@dataclass
class Colab:
    """What `install` puts in place."""

    drive: Drive = field(default_factory=Drive)
    files: Files = field(default_factory=Files)
    output: Output = field(default_factory=Output)


def install(colab=None):
    """Make `google.colab` importable, with `drive`, `files` and `output`; returns them."""
    colab = colab or Colab()
    package, google = ModuleType("google.colab"), sys.modules.get("google") or ModuleType("google")
    package.drive, package.files, package.output = colab.drive, colab.files, colab.output
    google.colab = package
    sys.modules |= {"google": google, "google.colab": package}
    sys.modules |= {f"google.colab.{name}": getattr(package, name) for name in ("drive", "files", "output")}
    return colab
