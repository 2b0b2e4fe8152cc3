"""A small prepared corpus and a tiny plan, shared by the tests of training."""

from pathlib import Path

import pytest

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's own source, prepared."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    corpus = FilesCorpus(
        path=str(folder),
        files=(str(ROOT / "raygrow/**/*.py"),),
        tokenizer=TokenizerConfig(vocab_size=512),
        validation_share=0.1,
    )
    prepare(corpus)
    return folder
