"""A small corpus of text files, with repeats."""

from pathlib import Path

import pytest

from raygrow.data.corpus import FilesCorpus, TokenizerConfig


@pytest.fixture
def corpus(tmp_path: Path) -> FilesCorpus:
    """40 documents, of which 30 differ, in files whose names say nothing about their order."""
    for number in range(40):
        (tmp_path / f"{number * 7 % 40:02d}.txt").write_text(f"document {number % 30}: \u00fc is two bytes\n" * 20)
    return FilesCorpus(
        path=str(tmp_path / "prepared"),
        files=str(tmp_path / "*.txt"),
        tokenizer=TokenizerConfig(vocab_size=280),
        validation_share=0.2,
        shard_tokens=1000,
    )
