"""Tiny models of several shapes, each made once."""

from collections.abc import Callable

import pytest

from raygrow.text.tokenizer import Tokenizer, train_tokenizer
from tests.infer.subjects import SHAPES, Subject, make_subject


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"def f{i}(x):\n    return x + {i} # äöü\n" for i in range(60)], 280)


@pytest.fixture(scope="session")
def subject_of(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def make(name: str) -> Subject:
        if name not in made:
            made[name] = make_subject(SHAPES[name], tokenizer, tmp_path_factory.mktemp("model"))
        return made[name]

    return make


@pytest.fixture(scope="session", params=SHAPES)
def each_subject(request: pytest.FixtureRequest, subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of(request.param)


@pytest.fixture(scope="session")
def subject(subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of("mixtral gqa")
