"""A small prepared corpus and a tiny plan, shared by the tests of training."""

import sysconfig
from pathlib import Path

import pytest

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare

PACKAGES = "asyncio", "email", "http", "importlib", "logging", "xml"
"""Of Python's library, 1.8 MB: unlike this project's own source, it does not change with what is tested."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some Python source, prepared."""
    folder = tmp_path_factory.mktemp("corpus") / "data"
    corpus = FilesCorpus(
        path=str(folder),
        files=tuple(f"{sysconfig.get_path('stdlib')}/{name}/**/*.py" for name in PACKAGES),
        tokenizer=TokenizerConfig(vocab_size=512),
        validation_share=0.1,
    )
    prepare(corpus)
    return folder
