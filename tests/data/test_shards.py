"""Reading shards: any window, and every kind of damage by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from raygrow.data.corpus import FilesCorpus
from raygrow.data.prepare import prepare
from raygrow.data.shards import ShardWriter, check_tokenizer, load_manifest, open_tokens
from raygrow.text.tokenizer import load_tokenizer, train_tokenizer


def test_windows_run_over_shard_ends(corpus: FilesCorpus) -> None:
    prepare(corpus)
    tokens = open_tokens(corpus.path, "train")
    raw = b"".join((Path(corpus.path) / s.file).read_bytes() for s in tokens.manifest.splits["train"].shards)
    everything = np.frombuffer(raw, dtype=tokens.manifest.dtype)
    assert tokens.n_tokens == len(everything)
    for start, length in ((0, 10), (995, 10), (1000, 1000), (999, 2002), (0, tokens.n_tokens), (tokens.n_tokens, 0)):
        assert np.array_equal(tokens.window(start, length), everything[start : start + length])
    for start, length in ((tokens.n_tokens - 1, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"train split has {tokens.n_tokens}"):
            tokens.window(start, length)


@pytest.mark.parametrize("sizes", [[1], [10], [3, 7, 25, 0, 1], [5, 5, 5]])
def test_writer_fills_every_shard_but_the_last(sizes: list[int], tmp_path: Path) -> None:
    dtype = np.dtype("<u2")
    writer = ShardWriter(tmp_path, "train", dtype=dtype, shard_tokens=5)
    tokens = np.arange(sum(sizes))
    for piece in np.split(tokens, np.cumsum(sizes)[:-1]):
        writer.write(piece)
    shards = writer.finish()
    assert [shard.tokens for shard in shards] == [min(5, sum(sizes) - start) for start in range(0, sum(sizes), 5)]
    found = np.concatenate([np.fromfile(tmp_path / shard.file, dtype) for shard in shards])
    assert np.array_equal(found, tokens)


def test_damaged_shards_are_named(corpus: FilesCorpus) -> None:
    prepare(corpus)
    path = Path(corpus.path) / "train-00001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])
    with pytest.raises(ValueError, match=r"train-00001\.bin: the checksum is off"):
        open_tokens(corpus.path, "train")
    assert open_tokens(corpus.path, "train", verify=False).n_tokens
    assert open_tokens(corpus.path, "validation").n_tokens
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train-00001\.bin: this shard has 1999 bytes instead of 2000"):
        open_tokens(corpus.path, "train", verify=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.bin: this shard is missing"):
        open_tokens(corpus.path, "train", verify=False)


def test_damaged_manifests_are_named(corpus: FilesCorpus, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no prepared data here"):
        open_tokens(tmp_path / "nowhere", "train")
    prepare(corpus)
    path = Path(corpus.path) / "manifest.json"
    text = path.read_text()
    for damaged in (text[:100], json.dumps(json.loads(text) | {"version": 99}), json.dumps({"version": 1})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: cannot be read"):
            load_manifest(corpus.path)


def test_tokenizer_of_other_data_is_refused(corpus: FilesCorpus) -> None:
    manifest = prepare(corpus)
    check_tokenizer(manifest, load_tokenizer(Path(corpus.path) / "tokenizer"))
    other = train_tokenizer(["another language"], 270)
    with pytest.raises(ValueError, match=rf"models/other is not the one.*{other.sha256[:12]}.*data\.tokenizer\.path"):
        check_tokenizer(manifest, other, name="models/other")
