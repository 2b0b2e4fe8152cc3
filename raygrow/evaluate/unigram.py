"""The loss of a model that knows only how frequent each token is: what training has to get well below."""

from pathlib import Path

import numpy as np

from raygrow.data.shards import Split, open_tokens

SAMPLE_TOKENS = 2**25
"""Tokens counted per split. Documents are ordered by hash, so the first ones are a fair sample of any corpus."""

CHUNK_TOKENS = 2**22


def unigram_loss(data: Path) -> float:
    """Nats per token of the train split's token frequencies on the validation split, add-one smoothed.

    Args:
        data: A folder of prepared data.

    Raises:
        FileNotFoundError: If the folder holds no prepared data, or a shard is missing.
        ValueError: If a shard is damaged.
    """
    train, validation = (token_counts(data, split) for split in ("train", "validation"))
    log_share = np.log(train + 1) - np.log(train.sum() + len(train))
    return float(-(validation * log_share).sum() / validation.sum())


def token_counts(data: Path, split: Split) -> np.ndarray:
    """How often each token id occurs in (the first `SAMPLE_TOKENS` of) a split."""
    tokens = open_tokens(data, split, verify=False)
    end, counts = min(tokens.n_tokens, SAMPLE_TOKENS), np.zeros(tokens.manifest.vocab_size, dtype=np.int64)
    for start in range(0, end, CHUNK_TOKENS):
        counts += np.bincount(tokens.window(start, min(CHUNK_TOKENS, end - start)), minlength=len(counts))
    return counts
