"""Where text comes from: WikiText through `datasets`, local files, or the text that every CPython carries.

A corpus is three lists of texts (train, validation, and test where there is one). Blank texts are left out.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from newllm_lib.config import DataConfig
from newllm_lib.config.portable import ELSEWHERE
from newllm_lib.errors import ConfigError, DataError, FileMissingError, NetworkError
from newllm_lib.escaping import shell_word
from newllm_lib.system.files import DISK_FULL, file_error, file_errors

SPLITS = ("train", "validation", "test")

HUB_REPOSITORY = "Salesforce/wikitext"
HUB_CONFIGS = {"wikitext-2": "wikitext-2-v1", "wikitext-103": "wikitext-103-v1"}
HUB_TIMEOUT_SECONDS = 5

_SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
_SUFFIXES = {".txt", ".tokens", ".raw"}


@dataclass(frozen=True)
class Corpus:
    """Texts by split, and the name of their source."""

    name: str
    splits: dict[str, list[str]]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the texts and their splits: the same content gives the same value wherever it lies."""
        digest = hashlib.sha256()
        for split in SPLITS:
            texts = self.splits.get(split, [])
            digest.update(f"{split} {len(texts)}\n".encode())
            if any("\n" in text for text in texts):  # then the ends of lines do not tell where a text ends
                digest.update(f"{[len(text) for text in texts]}\n".encode())
            digest.update("\n".join(texts).encode())
        return digest.hexdigest()


@file_errors()
def load_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config.data` names.

    Raises DataError, FileError or NetworkError, with the place and what to do, when the source is unknown, empty, not
    UTF-8, lacks a split, or cannot be reached.
    """
    sources = config.data if isinstance(config.data, tuple) else (config.data,)
    if found := [source.removeprefix(ELSEWHERE) for source in sources if source.startswith(ELSEWHERE)]:
        raise DataError(
            f"data {', '.join(found)}: this text is on the machine that the run came from. Pass where it is on this "
            "one: data=... (in the shell --data, in the notebook DATA)"
        )
    if len(sources) == 1:
        if sources[0] == "builtin":
            return _builtin()
        if sources[0] in HUB_CONFIGS:
            return _from_hub(sources[0])
        if Path(sources[0]).is_dir():
            return _from_folder(Path(sources[0]), config.text_unit)
    return _from_files(list(dict.fromkeys(path for source in sources for path in _expand(source))), config)


def _expand(source: str) -> list[Path]:
    """The files that a path or a pattern such as 'src/**/*.py' stands for, sorted."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(f"data {source}: a folder stands alone; several sources must be files or patterns")
    found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise FileMissingError(
            f"data {source}: no such folder, file or pattern. Give a folder with train.txt and valid.txt, text files, "
            f"or one of: builtin, {', '.join(HUB_CONFIGS)}"
        )
    return found


# --- local files ------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, unit: str) -> Corpus:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _split_of(path)
        if split is None:
            continue
        if split in files:
            raise DataError(f"data {folder}: both {files[split].name} and {path.name} are the {split} split; keep one")
        files[split] = path
    for split, example in (("train", "train.txt"), ("validation", "valid.txt")):
        if split not in files:
            pattern = shell_word(f"{glob.escape(str(folder))}/*.txt")
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise DataError(
                f"data {folder}: no {split} split. Name it {example} (or wiki.{example[:5]}.tokens, .raw); the folder "
                f"holds {there}. For loose text files give a pattern instead: --data {pattern}"
            )
    return Corpus(_shown(folder.resolve().name), {split: read_texts(path, unit) for split, path in files.items()})


def _split_of(path: Path) -> str | None:
    """The split that a file's name tells: train.txt, wiki.valid.tokens, validation.raw, ..."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        return None
    return next((_SPLIT_NAMES[part] for part in path.stem.lower().split(".") if part in _SPLIT_NAMES), None)


def _from_files(paths: list[Path], config: DataConfig) -> Corpus:
    """Each file's last texts become test, those before them validation, the rest train: stable, and no overlap.

    Where a text is a whole file, the same goes for the files in their order.
    """
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    texts: dict[Path, list[str]] = {}
    for path in paths:
        if len(paths) == 1 or _bytes(path).strip():  # a pattern may well meet an empty __init__.py
            texts[path] = read_texts(path, config.text_unit)
    if not texts:
        raise DataError(f"data {paths[0]} and {len(paths) - 1} more: all of these files are empty")
    groups = list(texts.values())
    if config.text_unit == "file":
        groups = [list(itertools.chain.from_iterable(groups))]
    for group in groups:
        parts = split_texts(group, config.validation_fraction, config.test_fraction)
        for split, part in zip(SPLITS, parts, strict=True):
            splits[split].extend(part)
    for split in SPLITS:
        if not splits[split]:
            raise DataError(
                f"data {paths[0]}: {sum(map(len, splits.values()))} texts (one a {config.text_unit}) are too few for "
                f"a {split} split of their own; give more text, or a folder with train.txt and valid.txt"
            )
    name = paths[0].stem if len(paths) == 1 else f"{paths[0].stem}+{len(paths) - 1}"
    return Corpus(_shown(name), splits)


def _shown(name: str) -> str:
    """A file's name as text: bytes in it that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


def split_texts(
    texts: list[str], validation_fraction: float, test_fraction: float
) -> tuple[list[str], list[str], list[str]]:
    """Train, validation and test in the order of the file; one text at least for each where there are three."""
    held_out = 1 if len(texts) >= 3 else 0
    num_test = max(held_out, round(len(texts) * test_fraction))
    num_validation = max(held_out, round(len(texts) * validation_fraction))
    num_validation = min(num_validation, len(texts) - num_test)
    first = len(texts) - num_test - num_validation
    return texts[:first], texts[first : len(texts) - num_test], texts[len(texts) - num_test :]


def read_texts(path: Path, unit: str) -> list[str]:
    """The non-blank texts of a UTF-8 file: its lines, its paragraphs, or all of it."""
    raw = _bytes(path)
    if b"\0" in raw[:65_536]:
        raise DataError(f"data {path}: holds NUL bytes, so it is a binary file or UTF-16; save it as UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(raw) - len(error.object)  # the decoder counts from behind a byte order mark
        line = raw.count(b"\n", 0, start) + 1
        raise DataError(
            f"data {path}: not UTF-8 at byte {start} (line {line}); convert it, for example: "
            f"iconv -f latin1 -t utf-8 -- {shell_word(path)}"
        ) from error
    texts = split_units(text, unit)
    if not texts:
        raise DataError(f"data {path}: the file is empty; it must hold at least one non-blank line")
    return texts


def _bytes(path: Path) -> bytes:
    with file_errors(path, f"data {path}: cannot be read"):
        return path.read_bytes()


def split_units(text: str, unit: str) -> list[str]:
    """Lines, paragraphs with their lines joined, or all of a file; blank ones left out. Only line ends separate."""
    if unit == "file":
        return [text] if text.strip() else []
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if unit == "line":
        return [line for line in text.split("\n") if line.strip()]
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text)
    return [" ".join(line.strip() for line in part.split("\n")).strip() for part in paragraphs if part.strip()]


# --- the text that every CPython carries ------------------------------------------------------------------------


def _builtin() -> Corpus:
    """The language reference in `pydoc_data.topics`: 460 to 510 KB of English by Python version.

    Every tenth topic by name is validation, the one after it test. Topics share paragraphs, so each paragraph is
    taken once, and no text of one split stands in another. Drawn tables are left out.
    """
    from pydoc_data.topics import topics

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for index, name in enumerate(sorted(topics)):
        split = {8: "validation", 9: "test"}.get(index % 10, "train")
        for text in split_units(topics[name], "paragraph"):
            if text not in seen and "--+--" not in text:
                seen.add(text)
                splits[split].append(text)
    return Corpus("builtin", splits)


# --- WikiText through `datasets` --------------------------------------------------------------------------------


def _from_hub(name: str) -> Corpus:
    loaded = _load_hub_dataset(HUB_CONFIGS[name], name)
    return Corpus(name, {split: texts_of_rows(loaded[split]["text"]) for split in SPLITS})


def texts_of_rows(rows: Iterable[str]) -> list[str]:
    """Rows of the hub's table as a local file's lines would read: no line end, no blank ones."""
    return [row.rstrip("\r\n") for row in rows if row.strip()]


def _load_hub_dataset(config_name: str, name: str):
    """The dataset from the hub, or from the local cache when the hub does not answer within seconds.

    The library's own way of finding out that there is no network is to retry for half a minute.
    """
    import datasets

    local = Path(HUB_REPOSITORY).is_dir()
    try:
        if local or _hub_answers():
            return datasets.load_dataset(HUB_REPOSITORY, config_name)
        with _offline(datasets):
            return datasets.load_dataset(HUB_REPOSITORY, config_name)
    except Exception as error:  # datasets raises a dozen unrelated classes for "cannot be had"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise file_error(error, error.filename or "the cache of Hugging Face", f"data {name}") from error
        raise NetworkError(
            f"data {name}: cannot be loaded from the Hugging Face hub ({HUB_REPOSITORY}), nor is it in the local "
            f"cache. Go online, or set data (in the shell --data) to a folder with train.txt and valid.txt, or to "
            f"builtin. [{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}]"
        ) from error


def _hub_answers() -> bool:
    """Whether the hub can be reached now; False too when HF_HUB_OFFLINE is set."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(HUB_REPOSITORY, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # the transport's classes differ between huggingface_hub 0.x, 1.x and 2.x
        return False
    return True


@contextlib.contextmanager
def _offline(datasets) -> Iterator[None]:
    """Let `datasets` look in its cache only, without its retries."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
