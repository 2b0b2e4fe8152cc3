"""The sampler is a function of seed and index: nothing twice in an epoch, nothing depends on how it is called."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raygrow.data.sampler import Sampler, fixed_batch, permute
from raygrow.data.shards import Manifest, SplitInfo, Tokens


def counting_tokens(*lengths: int) -> Tokens:
    """Shards that count 0, 1, 2, ... on from one to the next."""
    ends = np.cumsum(lengths)
    split = SplitInfo(documents=1, bytes=int(ends[-1]), tokens=int(ends[-1]), shards=())
    manifest = Manifest(
        tokenizer_sha256="", vocab_size=2**16, eos_id=0, dtype="<u2", splits={"train": split}, settings={}
    )
    return Tokens(
        manifest, "train", [np.arange(end - n, end, dtype="<u2") for end, n in zip(ends, lengths, strict=True)]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 257, 1000, 4097])
def test_permutation_of_any_size_reaches_everything_once(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        keys = np.full(size, key, dtype=np.uint64)
        found = permute(np.arange(size), size=size, key=keys)
        assert sorted(found) == list(range(size))


def test_permutations_differ_by_key_and_leave_no_order() -> None:
    size = 10_000
    found = [permute(np.arange(size), size=size, key=np.full(size, key, dtype=np.uint64)) for key in range(8)]
    for a in range(8):
        assert abs(np.corrcoef(np.arange(size), found[a])[0, 1]) < 0.05
        for b in range(a):
            assert (found[a] == found[b]).sum() < 20
            assert abs(np.corrcoef(found[a], found[b])[0, 1]) < 0.05
    several = permute(np.arange(size), size=size, key=np.arange(size, dtype=np.uint64) % 8)
    assert all(several[i] == found[i % 8][i] for i in range(0, size, 97))


@pytest.mark.parametrize("seq_len", [8, 4, 2])
def test_epoch_reads_every_sample_once_and_targets_are_one_further(seq_len: int) -> None:
    sampler = Sampler(counting_tokens(83, 5, 40), seq_len=seq_len, window=8, seed=7)
    assert sampler.n_windows == 10 + 0 + 4
    tokens_BT, targets_BT = sampler.batch(0, sampler.n_samples)
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
    assert torch.equal(targets_BT, tokens_BT + 1)
    seen = tokens_BT.flatten().tolist()
    assert sorted(seen) == [*range(80), *range(88, 120)]


def test_batches_do_not_depend_on_how_they_are_cut() -> None:
    sampler = Sampler(counting_tokens(500), seq_len=4, window=8, seed=1)
    whole = sampler.batch(0, 3 * sampler.n_samples)
    for size in (1, 7, 50):
        pieces = [sampler.batch(i, size) for i in range(0, 3 * sampler.n_samples - size, size)]
        for part in (0, 1):
            joined = torch.cat([piece[part] for piece in pieces])
            assert torch.equal(joined, whole[part][: len(joined)])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    tokens = counting_tokens(5000)
    orders = [Sampler(tokens, seq_len=8, window=8, seed=seed).batch(0, 1248)[0][:, 0] for seed in (0, 1, -1)]
    orders = [part for order in orders for part in order.split(624)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert all((a == b).float().mean() < 0.05 for i, a in enumerate(orders) for b in orders[:i])


def test_shorter_samples_pass_over_the_same_windows_in_the_same_order() -> None:
    tokens = counting_tokens(300)
    long, short = (Sampler(tokens, seq_len=seq_len, window=16, seed=3) for seq_len in (16, 4))
    assert torch.equal(long.batch(5, 6)[0].flatten(), short.batch(20, 24)[0].flatten())


def test_fixed_batch_is_the_start_in_order() -> None:
    tokens = counting_tokens(21, 30)
    tokens_BT, targets_BT = fixed_batch(tokens, 3, 10)
    assert tokens_BT.tolist() == [[*range(10)], [*range(10, 20)], [*range(21, 31)]]
    assert torch.equal(targets_BT, tokens_BT + 1)
    assert all(len(fixed_batch(tokens, n, 10)[0]) == 4 for n in (0, 4, 100))


def test_errors_say_what_is_too_short() -> None:
    with pytest.raises(ValueError, match="seq_len=3 does not divide the window of 8"):
        Sampler(counting_tokens(100), seq_len=3, window=8, seed=0)
    with pytest.raises(ValueError, match=r"train split holds 16 tokens, at most 8 in a shard: .* data\.shard_tokens"):
        Sampler(counting_tokens(8, 8), seq_len=8, window=8, seed=0)
    with pytest.raises(ValueError, match="train split holds 8 tokens"):
        fixed_batch(counting_tokens(8), 0, 8)


def test_memory_mapped_shards_are_read_in_place(tmp_path: Path) -> None:
    np.arange(1000, dtype="<u2").tofile(tmp_path / "train.bin")
    tokens = counting_tokens(1000)
    mapped = Tokens(tokens.manifest, "train", [np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")])
    both = [Sampler(each, seq_len=16, window=32, seed=0).batch(3, 40) for each in (tokens, mapped)]
    assert torch.equal(both[0][0], both[1][0])
