"""Ray Data prepares the same bytes as one process, and fails with the same words."""

from dataclasses import replace
from pathlib import Path

import pytest
from ray.data import DataContext

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare
from raygrow.runtime.data import prepare_data, prepare_with_ray
from raygrow.text.tokenizer import END_OF_TEXT

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray")]


@pytest.fixture
def corpus(tmp_path: Path) -> FilesCorpus:
    for number in range(24):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number % 5}: \u00fc {END_OF_TEXT}\n" * 30 + "\0")
    return FilesCorpus(
        path=str(tmp_path / "local"),
        files=str(tmp_path / "*.txt"),
        tokenizer=TokenizerConfig(vocab_size=280),
        validation_share=0.2,
        shard_tokens=500,
        engine="ray",
    )


@pytest.fixture
def tiny_blocks() -> None:
    """Blocks of a few documents, so that repeats of one document come to lie in several."""
    DataContext.get_current().target_max_block_size = 2000


@pytest.fixture(autouse=True)
def _own_context():
    with DataContext.current(DataContext.get_current().copy()):
        yield


def test_both_engines_write_the_same_bytes(corpus: FilesCorpus, tiny_blocks: None) -> None:
    progress: list[tuple[int, int, str]] = []
    local = prepare(corpus)
    ray_corpus = replace(corpus, path=corpus.path + "-ray")
    assert prepare_data(ray_corpus, progress=lambda *step: progress.append(step)) == local
    assert content(ray_corpus.path) == content(corpus.path)
    assert sum(split.documents for split in local.splits.values()) == 5
    assert {step[2]: step[0] == step[1] for step in progress}["parts read"]


def content(folder: str) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def test_error_in_a_worker_is_one_line_and_leaves_nothing(corpus: FilesCorpus, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    config = replace(corpus, files=str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: has no text under 'text' \(it has body\)") as caught:
        prepare_with_ray(config)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
