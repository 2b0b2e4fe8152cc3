"""Preparing a corpus on a Ray cluster: Ray Data reads, sorts and tokenizes; the driver packs the shards.

The result is the same, byte for byte, as that of one process. Texts stay in Ray's object store, which spills to disk.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, Dataset
from ray.exceptions import RayTaskError

from raygrow.data.corpus import DataConfig, list_parts, read_documents
from raygrow.data.prepare import (
    Documents,
    TokenBatch,
    digest,
    first_training_digest,
    prepare,
    split_point,
    tokenize_texts,
)
from raygrow.data.shards import Manifest
from raygrow.progress import Progress, silent
from raygrow.runtime.cluster import connect
from raygrow.text.tokenizer import Tokenizer

READ_ROWS = 1024
TOKENIZE_ROWS = 512
BLOCKS_PER_CPU = 4


def prepare_data(config: DataConfig, *, progress: Progress = silent) -> Manifest:
    """Prepare a corpus with the engine that its config names. See `raygrow.data.prepare.prepare`."""
    return (prepare_with_ray if config.engine == "ray" else prepare)(config, progress=progress)


def prepare_with_ray(config: DataConfig, *, progress: Progress = silent) -> Manifest:
    """Prepare a corpus with Ray Data. See `raygrow.data.prepare.prepare`, which writes the same bytes."""
    with _plain_errors():
        return prepare(config, progress=progress, engine=read_corpus_with_ray)


def read_corpus_with_ray(config: DataConfig, progress: Progress = silent) -> dict[str, Documents]:
    """The engine for corpora of any size: rows of `digest` and `text`, sorted over the whole cluster."""
    connect()
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # `progress` tells it all
    parts = list_parts(config)
    n_blocks = min(len(parts), BLOCKS_PER_CPU * int(ray.cluster_resources()["CPU"]))

    def read(batch: Any) -> Iterator[pa.Table]:
        texts: list[str] = []
        for text in read_documents(config, batch["item"].tolist()):
            texts.append(text)
            if len(texts) == READ_ROWS:
                yield _table(texts)
                texts = []
        yield _table(texts)

    rows = ray.data.from_items(parts, override_num_blocks=n_blocks).map_batches(read, batch_size=None)
    blocks = _unique_blocks(rows.sort("digest"))
    progress(len(parts), len(parts), "parts read")
    threshold = first_training_digest(config.validation_share)
    counts = np.array(ray.get([_count.remote(block, threshold) for block in blocks])).reshape(-1, 2)
    documents, below = map(int, counts.sum(axis=0))
    n_validation = split_point(documents=documents, below=below)
    validation, train = ray.data.from_arrow_refs(blocks).split_at_indices([n_validation])
    return {
        "train": RayDocuments(train, documents - n_validation),
        "validation": RayDocuments(validation, n_validation),
    }


class RayDocuments:
    """Documents in Ray's object store.

    Args:
        rows: Their digests and texts, in order.
        count: How many they are.
    """

    def __init__(self, rows: Dataset, count: int) -> None:
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def texts(self) -> Iterator[str]:
        """The documents one by one."""
        return (row["text"] for row in self._rows.iter_rows())

    def tokenize(self, tokenizer: Tokenizer) -> Iterator[TokenBatch]:
        """The documents' tokens, in the same order."""

        def encode(batch: pa.Table) -> pa.Table:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core, and the others their own tasks
            texts = batch["text"].to_pylist()
            tokens = tokenize_texts(texts, tokenizer)
            size = sum(len(text.encode()) for text in texts)
            return pa.table({"tokens": [tokens.tobytes()], "documents": [len(texts)], "bytes": [size]})

        for row in self._rows.map_batches(encode, batch_format="pyarrow", batch_size=TOKENIZE_ROWS).iter_rows():
            yield TokenBatch(np.frombuffer(row["tokens"], dtype=np.uint32), row["documents"], row["bytes"])


def _table(texts: list[str]) -> pa.Table:
    digests = pa.array([digest(text) for text in texts], pa.string())
    return pa.table({"digest": digests, "text": pa.array(texts, pa.large_string())})


def _unique_blocks(ordered: Dataset) -> list[Any]:
    """The sorted blocks without repeated documents, which sorting has put side by side, also across two blocks."""
    blocks = ordered.materialize().to_arrow_refs()
    last = ray.get([_last_digest.remote(block) for block in blocks])
    filled = [(block, digest) for block, digest in zip(blocks, last, strict=True) if digest]
    before = ["", *(digest for _, digest in filled)]
    return [_drop_repeats.remote(block, digest) for (block, _), digest in zip(filled, before, strict=False)]


@ray.remote
def _last_digest(block: pa.Table) -> str | None:
    return block["digest"][-1].as_py() if len(block) else None


@ray.remote
def _drop_repeats(block: pa.Table, before: str) -> pa.Table:
    digests = np.array([before, *block["digest"].to_pylist()])
    return block.filter(pa.array(digests[1:] != digests[:-1]))


@ray.remote
def _count(block: pa.Table, threshold: str) -> tuple[int, int]:
    """Documents in a block, and those below the threshold."""
    return len(block), sum(digest < threshold for digest in block["digest"].to_pylist())


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises what a worker raised, without the tracebacks and hints that Ray prints and appends."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError):
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise
    finally:
        logger.setLevel(level)
