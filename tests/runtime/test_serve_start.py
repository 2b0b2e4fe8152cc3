"""Before an app answers: settings that cannot be are told in time, and a start that fails leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from raygrow.data.corpus import FilesCorpus
from raygrow.runtime.serve import build
from tests.runtime.serving import random_model


@pytest.fixture
def model(corpus: FilesCorpus, tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")


def described(model: Path, **more: Any) -> dict[str, Any]:
    """One of `llm_configs`."""
    return {"model_loading_config": {"model_id": "small", "model_source": str(model)}, **more}


def test_more_tokens_than_a_model_takes_are_told(model: Path) -> None:
    with pytest.raises(ValueError, match="small: max_model_len=1025: this model takes 1024 tokens at most"):
        build({"llm_configs": [described(model, engine_kwargs={"max_model_len": 1025})]})
