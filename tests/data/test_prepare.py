"""Preparing a corpus: what ends up in the shards, and that nothing half-written does."""

import json
import lzma
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import digest, prepare
from raygrow.data.shards import load_manifest, open_tokens
from raygrow.text.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]


def content(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def documents(folder: str, split: str) -> list[str]:
    """The texts of a split, out of its shards again."""
    tokens = open_tokens(folder, split)
    ids = tokens.window(0, tokens.n_tokens)
    ends = np.flatnonzero(ids == tokens.manifest.eos_id)
    assert ends[-1] == len(ids) - 1
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    return [tokenizer.decode(piece[:-1].tolist()) for piece in np.split(ids, ends[:-1] + 1)]


def test_shards_hold_every_document_once_in_the_order_of_its_hash(corpus: FilesCorpus) -> None:
    manifest = prepare(corpus)
    train, validation = documents(corpus.path, "train"), documents(corpus.path, "validation")
    texts = {Path(file).read_text() for file in Path(corpus.path).parent.glob("*.txt")}
    assert len(texts) == 30
    assert set(train) | set(validation) == texts
    assert [*validation, *train] == sorted(texts, key=digest)
    assert manifest == load_manifest(corpus.path)
    for name, split in {"train": train, "validation": validation}.items():
        info = manifest.splits[name]
        assert info.documents == len(split)
        assert info.bytes == sum(len(text.encode()) for text in split)
        assert info.tokens == sum(shard.tokens for shard in info.shards)
        assert all(shard.tokens == corpus.shard_tokens for shard in info.shards[:-1])
    assert len(manifest.splits["train"].shards) > 1


def test_a_document_stays_in_its_split_when_the_corpus_grows(corpus: FilesCorpus) -> None:
    prepare(corpus)
    for number in range(100, 120):
        (Path(corpus.path).parent / f"{number}.txt").write_text(f"new text {number}")
    larger = replace(corpus, path=corpus.path + "-larger")
    prepare(larger)
    for split in ("train", "validation"):
        assert set(documents(corpus.path, split)) < set(documents(larger.path, split))


def test_preparing_again_gives_the_same_bytes(corpus: FilesCorpus) -> None:
    again = replace(corpus, path=corpus.path + "-again")
    assert prepare(corpus) == prepare(again)
    assert content(corpus.path) == content(again.path)


def test_finished_folder_is_left_alone(corpus: FilesCorpus, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(corpus)
    before = {file: file.stat().st_mtime_ns for file in Path(corpus.path).rglob("*")}
    with caplog.at_level("INFO"):
        assert prepare(replace(corpus, engine="ray")) == first
    assert "already prepared" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in Path(corpus.path).rglob("*")} == before
    with pytest.raises(ValueError, match=r"data\.validation_share was 0\.2, is 0\.3.*data\.path"):
        prepare(replace(corpus, validation_share=0.3))
    with pytest.raises(ValueError, match=r"data\.tokenizer was .*280.*, is .*290"):
        prepare(replace(corpus, tokenizer=TokenizerConfig(vocab_size=290)))


def test_the_folder_one_is_in_is_not_replaced(
    corpus: FilesCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^data\.path=\.: is the folder that you are in"):
        prepare(replace(corpus, path="."))
    assert Path.cwd().samefile(tmp_path / "empty")


def test_folder_with_other_files_is_not_touched(corpus: FilesCorpus) -> None:
    Path(corpus.path).mkdir()
    (Path(corpus.path) / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="other files are in this folder"):
        prepare(corpus)
    assert list(content(corpus.path)) == ["thesis.tex"]


def test_finished_tokenizer_is_taken_as_it_is(corpus: FilesCorpus, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    train_tokenizer(["something else"] * 3, 270).save(folder)
    config = replace(corpus, tokenizer=TokenizerConfig(path=str(folder)))
    assert prepare(config).vocab_size == load_tokenizer(folder).vocab_size
    assert content(Path(config.path) / "tokenizer") == content(folder)
    train_tokenizer(["changed since"] * 3, 270).save(folder)
    with pytest.raises(ValueError, match="not the one that the data was prepared with"):
        prepare(config)


def test_validation_text_trains_no_tokenizer(corpus: FilesCorpus) -> None:
    prepare(corpus)
    expected = train_tokenizer(documents(corpus.path, "train"), 280)
    assert load_manifest(corpus.path).tokenizer_sha256 == expected.sha256


def test_a_tokenizer_learns_from_no_more_text_than_it_may(corpus: FilesCorpus) -> None:
    few = replace(corpus, tokenizer=TokenizerConfig(vocab_size=280, train_bytes=1))
    manifest = prepare(few)
    assert manifest.tokenizer_sha256 == train_tokenizer(documents(few.path, "train")[:1], 280).sha256


def test_large_vocabularies_take_four_bytes(corpus: FilesCorpus, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    train_tokenizer(["text"], 270).save(tmp_path)
    settings = json.loads(file.read_text())
    settings["model"]["vocab"]["d"] = 70_000
    file.write_text(json.dumps(settings))
    manifest = prepare(replace(corpus, tokenizer=TokenizerConfig(path=str(file))))
    assert (manifest.dtype, manifest.vocab_size) == ("<u4", 70_001)
    assert all(text.startswith("document") for text in documents(corpus.path, "train"))


def test_text_that_spells_the_end_token_ends_nothing(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} {END_OF_TEXT} {number}")
    config = FilesCorpus(path=str(tmp_path / "out"), files=str(tmp_path / "*.txt"))
    prepare(config)
    found = documents(config.path, "train") + documents(config.path, "validation")
    assert sorted(found) == [f"{number} {END_OF_TEXT} {number}" for number in range(3)]


@pytest.mark.parametrize("texts", [[], ["", " \n"], ["only one"], ["the same", "the same"]])
def test_corpus_without_two_documents_is_refused(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = FilesCorpus(path=str(tmp_path / "out"), files=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"the corpus has [01] documents"):
        prepare(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_two_documents_make_two_splits(share: float, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    config = FilesCorpus(path=str(tmp_path / "out"), files=str(tmp_path / "a.jsonl"), validation_share=share)
    manifest = prepare(config)
    assert [split.documents for split in manifest.splits.values()] == [1, 1]


FILL = """
import sys
from raygrow.data.prepare import prepare
from raygrow.data.corpus import FilesCorpus
try:
    prepare(FilesCorpus(path=sys.argv[1], files=sys.argv[2]))
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


def fill(target: Path, source: Path, *, limit: int = resource.RLIM_INFINITY) -> str:
    """Prepares a megabyte of numbers in a process of its own; returns what it complained about."""
    rng = np.random.default_rng(0)
    for number in range(8):
        (source / f"{number}.txt").write_text(" ".join(map(str, rng.integers(0, 10**9, 12_000))))
    command = [sys.executable, "-c", FILL, str(target), str(source / "*.txt")]
    limits = (limit, resource.RLIM_INFINITY)
    process = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    assert process.returncode == 1
    return process.stderr


def test_file_that_grows_too_large_leaves_nothing(tmp_path: Path) -> None:
    error = fill(tmp_path / "out", tmp_path, limit=400_000)
    assert "File too large: " in error
    assert "nothing is left of it" in error
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt"}


def test_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        error = fill(disk / "out", tmp_path)
        assert "No space left on device: " in error
        assert "nothing is left of it" in error
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_book_in_one_file_is_prepared_whole(tmp_path: Path) -> None:
    book = "".join(file.read_text() for file in sorted(ROOT.glob("raygrow/**/*.py")))
    (tmp_path / "book.txt.xz").write_bytes(lzma.compress(book.encode()))
    tokenizer = TokenizerConfig(vocab_size=1000, train_bytes=100_000)
    config = FilesCorpus(
        path=str(tmp_path / "out"), files=str(tmp_path / "book.txt.xz"), tokenizer=tokenizer, passage=4000
    )
    manifest = prepare(config)
    assert sum(split.bytes for split in manifest.splits.values()) == len(book.encode())
    assert manifest.splits["train"].documents > 50
    assert 2 < open_tokens(tmp_path / "out", "validation").bytes_per_token < 4
