"""Metadata and requirements: lower bounds that a Colab runtime already satisfies, so that nothing is replaced."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("newllm_lib/__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="newllm_lib",
    version=VERSION,
    description="Train, study and share New-LLM, a language model with a fixed-size context instead of attention",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["newllm_lib", "newllm_lib.*"]),
    install_requires=[
        "torch>=2.10",
        "numpy>=2.0",
        "datasets>=4.0",
        "pandas>=2.2",
        "matplotlib>=3.10",
        "tqdm>=4.67",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "click>=8.1",
        "sentencepiece>=0.2",
        "ipywidgets>=7.7",
        "gdown>=5.2",
        "filelock>=3.32",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "ruff>=0.9",
            "nbclient>=0.10",
            "ipykernel>=6.17",
            "nbstripout>=0.8",
            "playwright>=1.50",
        ],
    },
    entry_points={"console_scripts": ["newllm = newllm_lib.cli:main"]},
)
