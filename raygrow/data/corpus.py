"""Corpora, where text comes from: Python code on this machine, files, or any `datasets` path.

A corpus lists its parts (files, or slices of a dataset) and reads one part at a time, so that one process or many
workers can share the reading.
"""

import glob
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from raygrow.data.files import read_file
from raygrow.progress import Progress, silent
from raygrow.text.tokenizer import SMALLEST_VOCABULARY

logger = logging.getLogger(__name__)

PACKAGE_FOLDERS = ("site-packages", "dist-packages")
DATASET_PARTS = 32


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer a corpus is written with."""

    path: str | None = None
    """Folder of a finished tokenizer (any Hugging Face model folder will do); none trains one on the corpus."""
    vocab_size: int = 4096
    """Size of a trained tokenizer."""
    train_bytes: int = 32_000_000
    """Bytes of training text to learn a tokenizer from; more is slower and changes little."""

    def __post_init__(self) -> None:
        # the corpus is read before a tokenizer is trained on it: too late to say so
        for name, least in {"vocab_size": SMALLEST_VOCABULARY, "train_bytes": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What every kind of corpus has in common."""

    kind: str
    """Tells the kinds of corpus apart."""
    path: str
    """Folder to write the prepared corpus to."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation_share: float = 0.01
    """Share of the documents kept for validation."""
    shard_tokens: int = 100_000_000
    """Tokens in one shard file."""
    engine: Literal["local", "ray"] = "local"
    """One process that holds the text in memory, or Ray Data. Both write the same bytes."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share}: must lie between 0 and 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PythonCorpus(CorpusConfig):
    """Python source code, which every machine has. One file is one document."""

    kind: Literal["python_source"] = "python_source"
    roots: str | tuple[str, ...] = "stdlib"
    """`stdlib`; `site-packages` (the standard library and every installed package); or folders."""


@dataclass(frozen=True, kw_only=True)
class FilesCorpus(CorpusConfig):
    """Text, `.jsonl` or `.parquet` files, the first two also compressed (`.gz`, `.xz`, `.zst`)."""

    kind: Literal["files"] = "files"
    files: str | tuple[str, ...]
    """Paths, folders or glob patterns (`**` reaches into folders)."""
    text_key: str = "text"
    """Key (jsonl) or column (parquet) that holds the text of a document."""
    passage: int = 16_384
    """A text file is cut into documents at the first line end after this many characters; 0 keeps it whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passage < 0:
            raise ValueError(f"passage={self.passage}: must be at least 1, or 0 to keep files whole")


@dataclass(frozen=True, kw_only=True)
class DatasetCorpus(CorpusConfig):
    """Anything that `datasets.load_dataset` or `datasets.load_from_disk` takes. One row is one document."""

    kind: Literal["dataset"] = "dataset"
    dataset: str
    """Name on the Hugging Face hub, or a folder."""
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"


DataConfig = PythonCorpus | FilesCorpus | DatasetCorpus
"""Any corpus, told apart by its `kind`; what stands under the key `data`."""


def list_parts(config: DataConfig) -> list[str]:
    """Names of the parts that a corpus is read in: files, or slices of a dataset.

    Raises:
        FileNotFoundError: If a folder is missing or a pattern matches no file.
        ValueError: If a dataset cannot be loaded or lacks the text column.
    """
    if isinstance(config, PythonCorpus):
        return _python_files(_as_tuple(config.roots))
    if isinstance(config, FilesCorpus):
        return _matching_files(_as_tuple(config.files))
    n_parts = min(DATASET_PARTS, len(_load_dataset(config)))
    return [f"{config.dataset}:{part}/{n_parts}" for part in range(n_parts)]


def read_documents(config: DataConfig, parts: Sequence[str], *, progress: Progress = silent) -> Iterator[str]:
    """The documents in some parts of a corpus, in order. Blank and missing ones are left out.

    Raises:
        ValueError: If a part cannot be read; names the file, and the line where there is one.
    """
    skipped = 0
    for done, part in enumerate(parts, 1):
        try:
            for text in _read_part(config, part):
                if text is not None and not isinstance(text, str):
                    key = getattr(config, "text_key", None)
                    raise ValueError(f"{part}: data.text_key={key} holds {type(text).__name__} values, not text")
                if text and not text.isspace():
                    yield text
        except UnicodeDecodeError as error:
            if not isinstance(config, PythonCorpus):
                raise ValueError(f"{part}: is not UTF-8 text ({error}); convert it, for example with iconv") from error
            skipped += 1
        progress(done, len(parts), "parts read")
    if skipped:
        logger.warning("skipped %d Python files that are not UTF-8", skipped)


def _read_part(config: DataConfig, part: str) -> Iterator[Any]:
    if isinstance(config, PythonCorpus):
        yield Path(part).read_bytes().decode("utf-8-sig")
    elif isinstance(config, FilesCorpus):
        yield from read_file(Path(part), text_key=config.text_key, passage=config.passage)
    else:
        index, n_parts = map(int, part.rpartition(":")[2].split("/"))
        rows = _load_dataset(config).select_columns(config.text_key).shard(n_parts, index, contiguous=True)
        for batch in rows.iter(batch_size=1000):
            yield from batch[config.text_key]


def _python_files(roots: tuple[str, ...]) -> list[str]:
    """Every `.py` file under the roots; the standard library goes without the packages that are installed inside it."""
    installed = [path for path in sys.path if Path(path).name in PACKAGE_FOLDERS]
    stdlib = sysconfig.get_path("stdlib")
    known = {"stdlib": [stdlib], "site-packages": [stdlib, *installed]}
    files: set[str] = set()
    for folder in (folder for root in roots for folder in known.get(root, [root])):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"data.roots: there is no folder {folder}; give stdlib, site-packages, or folders")
        for parent, children, names in os.walk(folder):
            if folder == stdlib:
                children[:] = [child for child in children if child not in PACKAGE_FOLDERS]
            files.update(os.path.abspath(os.path.join(parent, name)) for name in names if name.endswith(".py"))
    return sorted(filter(os.path.isfile, files))  # a link may lead nowhere


def _matching_files(patterns: tuple[str, ...]) -> list[str]:
    files: set[str] = set()
    for pattern in map(os.path.expanduser, patterns):
        # what is there is meant as it is spelled: "notes [2].txt" is also the pattern of "notes 2.txt"
        wanted = glob.escape(pattern) if os.path.exists(pattern) else pattern
        wanted = os.path.join(wanted, "**") if os.path.isdir(pattern) else wanted
        found = [os.path.abspath(path) for path in glob.glob(wanted, recursive=True) if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"data.files: no file matches {pattern} (searched from {os.getcwd()})")
        files.update(found)
    return sorted(files)


@cache
def _load_dataset(config: DatasetCorpus) -> Any:
    """The `datasets.Dataset` of one split, memory-mapped."""
    import datasets  # slow to import, and most corpora do without

    try:
        if any(os.path.exists(os.path.join(config.dataset, name)) for name in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(config.dataset)
            rows = rows[config.split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(config.dataset, config.subset, split=config.split)
    except Exception as error:  # a dataset can fail in any way: network, unknown name, unknown split
        raise ValueError(f"data.dataset={config.dataset}: split {config.split} cannot be loaded ({error})") from error
    if config.text_key not in rows.column_names:
        raise ValueError(
            f"data.text_key={config.text_key}: {config.dataset} has no such column, only {', '.join(rows.column_names)}"
        )
    return rows


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
