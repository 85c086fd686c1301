"""Colab already satisfies every requirement, so that installing the library replaces nothing and forces no restart."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from requirement_lists import frozen_versions, setup_argument

FROZEN = Path(__file__).parent / "fixtures" / "colab_versions.txt"
COLAB_PYTHON = Version("3.13")


def replaced(requirements, versions):
    """What pip would install anew: each requirement that these versions do not satisfy, with what is there."""
    found = []
    for requirement in map(Requirement, requirements):
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            found.append(f"{requirement}: not there")
        elif not requirement.specifier.contains(version):
            found.append(f"{requirement}: {version} is there")
    return found


def test_colab_satisfies_every_requirement(repository):
    requirements = setup_argument((repository / "setup.py").read_text(encoding="utf-8"), "install_requires")
    assert len(requirements) > 5
    assert replaced(requirements, frozen_versions(FROZEN.read_text(encoding="utf-8"))) == []


def test_the_frozen_list_holds_what_is_required_and_no_more(repository):
    requirements = setup_argument((repository / "setup.py").read_text(encoding="utf-8"), "install_requires")
    names = {canonicalize_name(Requirement(text).name) for text in requirements}
    assert set(frozen_versions(FROZEN.read_text(encoding="utf-8"))) == names


def test_colabs_python_is_supported(repository):
    bounds = setup_argument((repository / "setup.py").read_text(encoding="utf-8"), "python_requires")
    assert SpecifierSet(bounds).contains(COLAB_PYTHON)


def test_what_colab_does_not_satisfy_is_reported_by_name():
    versions = frozen_versions("# of a machine\ntorch==2.11.0+cu128\nhuggingface_hub==1.27.0\nipywidgets==7.7.1\n")
    assert replaced(["torch>=2.11", "torch<2.12", "huggingface-hub>=1.0", "ipywidgets>=7.7"], versions) == []
    assert replaced(["torch>=2.12", "ipywidgets>=8", "gdown", "torch==2.11.0+cpu"], versions) == [
        "torch>=2.12: 2.11.0+cu128 is there",
        "ipywidgets>=8: 7.7.1 is there",
        "gdown: not there",
        "torch==2.11.0+cpu: 2.11.0+cu128 is there",
    ]


def test_requirements_are_read_without_running_setup():
    source = "raise SystemExit\nsetup(name='x', install_requires=['torch>=99'])"
    assert setup_argument(source, "install_requires") == ["torch>=99"]
