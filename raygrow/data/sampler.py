"""Which tokens a training sample holds: a pure function of the seed and the sample's number.

No state is kept, so a run goes on anywhere, with any number of workers, and reads what it would have read. The corpus
is cut into windows, and each epoch visits them in an order of its own: a permutation computed per index by a Feistel
network with cycle walking (Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9), so even a huge corpus needs no table.
Shapes: B samples, T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from raygrow.data.shards import Tokens

Batch = tuple[Tensor, Tensor]
ROUNDS = 6


class Sampler:
    """Samples of `seq_len` tokens and their targets, the tokens one further.

    A window holds `window // seq_len` samples, which are read one after another: a run whose phases use a shorter
    `seq_len` still passes over the same windows in the same order.

    Args:
        tokens: The training split.
        seq_len: Tokens in a sample.
        window: Tokens in a window, a multiple of `seq_len`; the longest sequence of the run.
        seed: Of the order.

    Raises:
        ValueError: If `seq_len` does not divide `window`, or no shard is as long as a window.
    """

    def __init__(self, tokens: Tokens, *, seq_len: int, window: int, seed: int) -> None:
        if window % seq_len:
            raise ValueError(f"seq_len={seq_len} does not divide the window of {window} tokens")
        self._shards, self._seq_len, self._window = tokens.shards, seq_len, window
        self._key = _hash(np.array([seed % 2**64], dtype=np.uint64))
        self._first_window = _first_windows(tokens, window)
        self.n_windows = int(self._first_window[-1])
        self.n_samples = self.n_windows * (window // seq_len)
        """Samples in an epoch."""

    def batch(self, first_sample: int, n: int) -> Batch:
        """Samples `first_sample` to `first_sample + n`, counted over all epochs, as `(tokens_BT, targets_BT)`."""
        per_window = self._window // self._seq_len
        window, within = np.divmod(np.arange(first_sample, first_sample + n), per_window)
        epoch, position = np.divmod(window, self.n_windows)
        window = permute(position, size=self.n_windows, key=_hash(epoch, self._key))
        shard = np.searchsorted(self._first_window, window, side="right") - 1
        start = (window - self._first_window[shard]) * self._window + within * self._seq_len
        return _gather([self._shards[index] for index in shard], start, self._seq_len)


def fixed_batch(tokens: Tokens, n: int, seq_len: int) -> Batch:
    """The first `n` sequences of a split in order, for validation; 0 takes all, and so does a number above.

    Raises:
        ValueError: If the split is shorter than one sequence.
    """
    first = _first_windows(tokens, seq_len)
    window = np.arange(min(n, first[-1]) if n else first[-1])
    shard = np.searchsorted(first, window, side="right") - 1
    return _gather([tokens.shards[index] for index in shard], (window - first[shard]) * seq_len, seq_len)


def permute(position: np.ndarray, *, size: int, key: np.ndarray) -> np.ndarray:
    """Where each position of `0..size-1` goes under the permutation that its key names.

    Args:
        position: Integers below `size`.
        size: Length of what is permuted.
        key: One uint64 per position; positions with the same key belong to the same permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits in each half of the network
    mask = (1 << half) - 1
    value, outside = position.astype(np.uint64), np.arange(len(position))
    while len(outside):  # what lands beyond `size` goes round again, which 3 in 4 do at worst
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_hash(right, key[outside] + turn) & mask)
        value[outside] = (left << half) | right
        outside = outside[value[outside] >= size]
    return value.astype(np.int64)


def _hash(value: np.ndarray, key: np.ndarray | int = 0) -> np.ndarray:
    """Mixes integers into 64 even bits: one step of splitmix64 (doi:10.1145/2660193.2660195), started at the key."""
    value = value.astype(np.uint64) * 0x9E3779B97F4A7C15 + key
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


def _first_windows(tokens: Tokens, window: int) -> np.ndarray:
    """Number of the first window in each shard, and in the end their total. No window crosses from shard to shard."""
    counts = [(len(shard) - 1) // window for shard in tokens.shards]  # the last target lies one token further
    if not sum(counts):
        longest = max(map(len, tokens.shards))
        raise ValueError(
            f"the {tokens.split} split holds {tokens.n_tokens} tokens, at most {longest} in a shard: too few for a "
            f"sequence of {window} + 1, which lies in one. Prepare more text, raise data.validation_share or "
            "data.shard_tokens, or choose a shorter seq_len"
        )
    return np.cumsum([0, *counts])


def _gather(shards: list[np.ndarray], start: np.ndarray, seq_len: int) -> Batch:
    rows = np.empty((len(shards), seq_len + 1), dtype=np.int64)
    for row, shard, first in zip(rows, shards, start, strict=True):
        row[:] = shard[first : first + seq_len + 1]
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
