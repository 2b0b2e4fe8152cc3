"""From text to token shards: read, drop duplicates, split, tokenize, pack.

Documents are ordered by the hash of their text. That shuffles them, decides which ones are for validation, puts
duplicates side by side, and makes the result the same however many processes did the work.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from raygrow.data.corpus import DataConfig, list_parts, read_documents
from raygrow.data.shards import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    ShardWriter,
    SplitInfo,
    check_tokenizer,
    load_manifest,
)
from raygrow.progress import Progress, silent
from raygrow.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from raygrow.weights.atomic import new_folder

logger = logging.getLogger(__name__)

BATCH_BYTES = 4_000_000
"""Text tokenized at a time: enough to keep every core busy."""


class TokenBatch(NamedTuple):
    """Some documents' token ids, each document closed by the end-of-text token."""

    tokens: np.ndarray
    documents: int
    bytes: int


class Documents(Protocol):
    """The documents of one split, unique and in order of their digests."""

    def __len__(self) -> int: ...

    def texts(self) -> Iterator[str]:
        """The documents one by one."""
        ...

    def tokenize(self, tokenizer: Tokenizer) -> Iterator[TokenBatch]:
        """The documents' tokens, in the same order."""
        ...


Engine = Callable[[DataConfig, Progress], Mapping[str, Documents]]
"""Reads a corpus, and gives its `train` and `validation` documents."""


def prepare(config: DataConfig, *, progress: Progress = silent, engine: Engine | None = None) -> Manifest:
    """Write the shards, manifest and tokenizer of a corpus. A folder that is already finished is left as it is.

    Args:
        config: The corpus.
        progress: Called as the work goes on.
        engine: Does the reading and tokenizing; in this process, in memory, unless another one is given.

    Raises:
        FileNotFoundError: If no file matches, or the tokenizer is missing.
        ValueError: If a file cannot be read, the corpus is empty, or the folder holds other data.
        OSError: If the disk fills up. Nothing is left under `config.path` then.
    """
    folder = Path(config.path)
    if folder.is_dir() and any(folder.iterdir()):
        return _finished(config)
    if folder.resolve() == Path.cwd():
        raise ValueError(f"data.path={config.path}: is the folder that you are in; name one to be made")
    tokenizer = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
    with new_folder(folder, replace=folder.is_dir()) as aside:
        splits = (engine or read_corpus)(config, progress)
        if tokenizer is None:
            tokenizer = train_tokenizer(_training_text(config, splits["train"], progress), config.tokenizer.vocab_size)
        tokenizer.save(aside / TOKENIZER_FOLDER)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        manifest = Manifest(
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=dtype.str,
            splits={
                name: _write_split(
                    ShardWriter(aside, name, dtype=dtype, shard_tokens=config.shard_tokens),
                    documents,
                    tokenizer,
                    progress,
                )
                for name, documents in splits.items()
            },
            settings=content_settings(config),
        )
        manifest.save(aside)
    return manifest


def digest(text: str) -> str:
    """What tells documents apart and orders them: 128 bits of their text's hash, in hexadecimal."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_training_digest(validation_share: float) -> str:
    """Documents with a smaller digest than this one are for validation, wherever else they may turn up."""
    return f"{int(validation_share * 2**64):016x}"


def split_point(*, documents: int, below: int) -> int:
    """How many documents, from the first, are for validation: those `below` the threshold, and at least one.

    Raises:
        ValueError: If there is nothing left to train on.
    """
    if documents < 2:
        raise ValueError(
            f"the corpus has {documents} documents that are not blank, and needs at least two (one for "
            "validation); give it more text"
        )
    return min(max(below, 1), documents - 1)


def tokenize_texts(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of texts one after another, each closed by the end-of-text token."""
    end = [tokenizer.eos_id]
    return np.concatenate([np.array(ids + end, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)])


class LocalDocuments:
    """Documents held in memory."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self) -> Iterator[str]:
        """The documents one by one."""
        return iter(self._texts)

    def tokenize(self, tokenizer: Tokenizer) -> Iterator[TokenBatch]:
        """The documents' tokens, in the same order."""
        batch: list[str] = []
        size = 0
        for position, text in enumerate(self._texts, 1):
            batch.append(text)
            size += len(text.encode())
            if size >= BATCH_BYTES or position == len(self._texts):
                yield TokenBatch(tokenize_texts(batch, tokenizer), len(batch), size)
                batch, size = [], 0


def read_corpus(config: DataConfig, progress: Progress = silent) -> dict[str, Documents]:
    """The engine for corpora that fit into memory."""
    unique = {digest(text): text for text in read_documents(config, list_parts(config), progress=progress)}
    ordered = sorted(unique)
    below = int(np.searchsorted(ordered, first_training_digest(config.validation_share)))
    n_validation = split_point(documents=len(ordered), below=below)
    texts = [unique[key] for key in ordered]
    return {"train": LocalDocuments(texts[n_validation:]), "validation": LocalDocuments(texts[:n_validation])}


def _training_text(config: DataConfig, documents: Documents, progress: Progress) -> Iterator[str]:
    """The first documents to train on, as far as a tokenizer should look. Validation text is never among them."""
    total, seen = config.tokenizer.train_bytes, 0
    for text in documents.texts():
        if seen >= total:
            break
        yield text
        seen += len(text.encode())
        progress(min(seen, total), total, "bytes for the tokenizer")
    progress(total, total, "bytes for the tokenizer")  # the corpus may be smaller


def _write_split(writer: ShardWriter, documents: Documents, tokenizer: Tokenizer, progress: Progress) -> SplitInfo:
    n_documents = n_bytes = n_tokens = 0
    for batch in documents.tokenize(tokenizer):
        writer.write(batch.tokens)
        n_documents, n_bytes = n_documents + batch.documents, n_bytes + batch.bytes
        n_tokens += len(batch.tokens)
        progress(n_documents, len(documents), f"{writer.split} documents tokenized")
    return SplitInfo(documents=n_documents, bytes=n_bytes, tokens=n_tokens, shards=writer.finish())


def content_settings(config: DataConfig) -> dict[str, Any]:
    """What decides the content of the shards, as JSON gives it: neither where they lie nor which engine wrote them."""
    settings = {key: value for key, value in asdict(config).items() if key not in ("path", "engine")}
    return json.loads(json.dumps(settings))


def _finished(config: DataConfig) -> Manifest:
    """The manifest of a folder that is there already, if it is what the config asks for."""
    if not (Path(config.path) / MANIFEST_FILE).exists():
        raise ValueError(f"data.path={config.path}: other files are in this folder; name one that is empty or new")
    manifest = load_manifest(config.path)
    wanted = content_settings(config)
    changed = [key for key in wanted if manifest.settings.get(key) != wanted[key]]
    if changed:
        differences = "; ".join(f"data.{key} was {manifest.settings.get(key)}, is {wanted[key]}" for key in changed)
        raise ValueError(
            f"{config.path} was prepared with other settings ({differences}). "
            "Set data.path to another folder, or delete this one"
        )
    if config.tokenizer.path:
        check_tokenizer(manifest, load_tokenizer(config.tokenizer.path), name=config.tokenizer.path)
    logger.info("%s is already prepared", config.path)
    return manifest
