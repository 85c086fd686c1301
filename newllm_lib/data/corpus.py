"""Where text comes from: WikiText through `datasets`, local files, or the text that every CPython carries.

A corpus is three lists of texts (train, validation, and test where there is one). Blank texts are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from newllm_lib.config import DataConfig
from newllm_lib.config.portable import ELSEWHERE
from newllm_lib.data.encodings import decoded, table_note
from newllm_lib.data.sources import real_files, refuse_dangling
from newllm_lib.errors import ConfigError, DataError, NetworkError
from newllm_lib.escaping import shell_word
from newllm_lib.system.console import in_kernel
from newllm_lib.system.files import DISK_FULL, file_error, file_errors

SPLITS = ("train", "validation", "test")
ALL = "all"
"""The split that is the whole text, for scoring."""

HUB_REPOSITORY = "Salesforce/wikitext"
HUB_CONFIGS = {"wikitext-2": "wikitext-2-v1", "wikitext-103": "wikitext-103-v1"}
HUB_TIMEOUT_SECONDS = 5

_SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "test": "test"}
_SUFFIXES = {".txt", ".tokens", ".raw"}


_MOST_REPEATED = 0.01
"""Share of the validation text that may stand in training without a word: WikiText-2's headings are 0.48 %."""


@dataclass(frozen=True)
class Corpus:
    """Texts by split, and the name of their source."""

    name: str
    splits: dict[str, list[str]]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Sentences on what was found while reading, for whoever uses the text; no path is in them."""
    left_out: int = field(default=0, compare=False)
    """Paths that lead to a file which was read already."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the texts and their splits: the same content gives the same value wherever it lies."""
        digest = hashlib.sha256()
        for split in (*SPLITS, *(self.splits.keys() - set(SPLITS))):
            texts = self.splits.get(split, [])
            digest.update(f"{split} {len(texts)}\n".encode())
            if any("\n" in text for text in texts):  # then the ends of lines do not tell where a text ends
                digest.update(f"{[len(text) for text in texts]}\n".encode())
            digest.update("\n".join(texts).encode())
        return digest.hexdigest()


@file_errors()
def load_corpus(config: DataConfig, scored: str | None = None) -> Corpus:
    """The corpus that `config.data` names.

    scored: the one split that is wanted, where nothing is trained: no other has to be there. "all" takes every split
    that there is, and files as they are, in one split of that name. Raises ConfigError, DataError, FileError or
    NetworkError, with the place and what to do, when the source is unknown, empty, not UTF-8, lacks a split, or cannot
    be reached.
    """
    sources = config.data if isinstance(config.data, tuple) else (config.data,)
    if found := [source.removeprefix(ELSEWHERE) for source in sources if source.startswith(ELSEWHERE)]:
        raise DataError(
            f"data {', '.join(found)}: this text is on the machine that the run came from. Pass where it is on this "
            "one: data=... (in the shell --data, in the notebook DATA)"
        )
    if len(sources) == 1:
        if sources[0] in _NAMED_UNITS:
            if scored is None:
                _check_unit(sources[0], config.text_unit)
            return _builtin() if sources[0] == "builtin" else _from_hub(sources[0])
        if Path(sources[0]).is_dir():
            return _with_notes(_from_folder(Path(sources[0]), config.text_unit, scored))
    return _with_notes(_from_files(sources, config, scored))


_NAMED_UNITS = {"builtin": "paragraph"} | dict.fromkeys(HUB_CONFIGS, "line")
"""What one text is in the data that have names."""


def _check_unit(name: str, unit: str) -> None:
    """ConfigError for a unit in which a named text does not come; "line", the default, stands for its own."""
    if unit not in ("line", _NAMED_UNITS[name]):
        raise ConfigError(
            f"text_unit = {unit!r}: the texts of {name} are {_NAMED_UNITS[name]}s and come in no other "
            "unit; leave it out, or give text files"
        )


def _with_notes(corpus: Corpus) -> Corpus:
    """With what whoever trains on local files should know of them."""
    notes = list(corpus.notes)
    if corpus.left_out:
        notes.append(
            f"{corpus.left_out:,} paths that lead, through links, to files that are in the data already are left out: "
            "each file is read once"
        )
    repeated, share = _repeated(corpus.splits)
    if share > _MOST_REPEATED:
        notes.append(
            f"{repeated:,} of {len(corpus.splits['validation']):,} validation texts ({share:.1%} of the characters) "
            "also stand in training, word for word, so the scores are better than on new text"
        )
    return dataclasses.replace(corpus, notes=tuple(notes))


def _repeated(splits: dict[str, list[str]]) -> tuple[int, float]:
    """How many validation texts are training texts too, and their share of the characters."""
    known = {text.strip() for text in splits.get("train", [])}
    texts = [text.strip() for text in splits.get("validation", [])]
    again = [text for text in texts if text in known]
    return len(again), sum(map(len, again)) / max(1, sum(map(len, texts)))


# --- local files ------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, unit: str, scored: str | None) -> Corpus:
    files: dict[str, Path] = {}
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # macOS leaves ._train.txt
    for path in visible:
        split = _split_of(path)
        if split is None:
            continue
        if split in files:
            raise DataError(f"data {folder}: both {files[split].name} and {path.name} are the {split} split; keep one")
        files[split] = path
    wanted = ("train", "validation") if scored is None else (scored,)
    missing = [split for split in wanted if split in SPLITS and split not in files]
    if missing or not files:
        raise DataError(_missing_split(folder, (missing or ["validation"])[0], visible, bool(files) and scored))
    found = {split: path for split, path in files.items() if scored in (None, ALL, split)}
    return Corpus(_shown(folder.resolve().name), {split: read_texts(path, unit) for split, path in found.items()})


def _missing_split(folder: Path, split: str, visible: list[Path], scored: bool) -> str:
    example = {"validation": "valid"}.get(split, split)
    there = ", ".join(path.name for path in visible[:8]) or "nothing"
    pattern = shell_word(f"{glob.escape(str(folder))}/*.txt")
    way_out = (
        "To score all that is there: split='all' (in the shell --split all)"
        if scored
        else f"For loose text files give a pattern instead: --data {pattern}"
    )
    return (
        f"data {folder}: no {split} split. Name it {example}.txt (or wiki.{example}.tokens, .raw); the folder holds "
        f"{there}. {way_out}"
    )


def _split_of(path: Path) -> str | None:
    """The split that a file's name tells: train.txt, wiki.valid.tokens, validation.raw, ..."""
    names = (_SPLIT_NAMES[part] for part in path.stem.lower().split(".") if part in _SPLIT_NAMES)
    split = next(names, None) if path.suffix in _SUFFIXES else None
    if split:
        refuse_dangling(path)
    return split if path.is_file() else None


def _from_files(sources: tuple[str, ...], config: DataConfig, scored: str | None) -> Corpus:
    """Each file's last texts become test, those before them validation, the rest train: stable, and no overlap.

    Where a text is a whole file, the same goes for the files in their order. Nothing is cut for the split "all".
    """
    paths, left_out = real_files(sources)
    texts: dict[Path, list[str]] = {}
    notes: list[str] = []
    for path in paths:
        if len(paths) == 1 or _bytes(path).strip():  # a pattern may well meet an empty __init__.py
            texts[path] = read_texts(path, config.text_unit)
            if len(paths) == 1 and (note := table_note(texts[path][0], path)):
                notes.append(note)
    if not texts:
        raise DataError(f"data {paths[0]} and {len(paths) - 1} more: all of these files are empty")
    name = _shown(paths[0].stem if len(paths) == 1 else f"{paths[0].stem}+{len(paths) - 1}")
    everything = list(itertools.chain.from_iterable(texts.values()))
    if scored == ALL:
        splits = {ALL: everything}
    else:
        splits = _cut([everything] if config.text_unit == "file" else list(texts.values()), config)
        empty = [split for split in SPLITS if not splits[split] and scored in (None, split)]
        if empty:
            raise DataError(f"data {paths[0]}: {_too_few(len(everything), empty[0], config, paths[0])}")
    return Corpus(name, splits, tuple(notes), left_out)


def _cut(groups: list[list[str]], config: DataConfig) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for group in groups:
        parts = split_texts(group, config.validation_fraction, config.test_fraction)
        for split, part in zip(SPLITS, parts, strict=True):
            splits[split].extend(part)
    return splits


def _too_few(count: int, split: str, config: DataConfig, path: Path) -> str:
    """Why nothing is left for a split, and what would leave something."""
    unit = config.text_unit
    if split == "train" and count >= 3:
        return (
            f"validation_fraction = {config.validation_fraction:g} and test_fraction = {config.test_fraction:g} leave "
            f"none of {count:,} texts (one a {unit}) to train on; make them smaller"
        )
    finer = {
        "file": "use text_unit line or paragraph (in the shell --text-unit)",
        "paragraph": "use text_unit line (in the shell --text-unit)",
        "line": f"if its lines are long, cut them: fold -s -w 1000 -- {shell_word(path)} > NEW.txt",
    }
    subject = f"1 text (one a {unit}) is" if count == 1 else f"{count} texts (one a {unit}) are"
    return (
        f"{subject} too few for train, validation and test ({split} would be empty); {finer[unit]}. Or give more text, "
        "or a folder with train.txt and valid.txt"
    )


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
    texts = split_units(decoded(_bytes(path), f"data {path}", path), unit)
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

    The library's own way of finding out that there is no network is to retry for half a minute. The text is public:
    token=False keeps the library from asking for one (see `system.hub`).
    """
    import datasets

    no_hub = None if Path(HUB_REPOSITORY).is_dir() else _why_no_hub()
    try:
        if no_hub is None:
            return datasets.load_dataset(HUB_REPOSITORY, config_name, token=False)
        with _offline(datasets):
            return datasets.load_dataset(HUB_REPOSITORY, config_name, token=False)
    except Exception as error:  # datasets raises a dozen unrelated classes for "cannot be had"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise file_error(error, error.filename or "the cache of Hugging Face", f"data {name}") from error
        way_out = "DATA in the settings, or data in the panel," if in_kernel() else "data (in the shell --data)"
        raise NetworkError(
            f"data {name}: cannot be loaded from the Hugging Face hub ({HUB_REPOSITORY}), nor is it in the local "
            f"cache. Go online, or set {way_out} to a folder with train.txt and valid.txt, or to builtin. "
            f"[{no_hub or _first_line(error)}]"
        ) from (error if no_hub is None else None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _why_no_hub() -> str | None:
    """Why the hub cannot be reached now, None where it can."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(HUB_REPOSITORY, timeout=HUB_TIMEOUT_SECONDS, token=False)
    except huggingface_hub.errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    except Exception as error:  # the transport's classes differ between huggingface_hub 0.x, 1.x and 2.x
        return f"no connection to the hub: {_first_line(error)}"
    return None


@contextlib.contextmanager
def _offline(datasets) -> Iterator[None]:
    """Let `datasets` look in its cache only, without its retries."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
