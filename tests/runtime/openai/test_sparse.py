"""A sparse model behind the API answers with the engine's own tokens, and says how sparse it is."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.request import Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.rack import Rack
from raygrow.runtime.openai.app import make_app
from raygrow.text.tokenizer import Tokenizer
from raygrow.weights.folder import write_folder
from tests.runtime.openai.local import LocalModel, served
from tests.sparsity.plans import add_plan

PROMPTS = ["def grow(", "    return the", "m", "grown # \u00e4"]
LEVEL = 0.4


@pytest.fixture(scope="module")
def folder(rack: Rack, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sparse")
    tokenizer.save(place / "tokenizer")
    tensors = ((name, parameter.detach()) for name, parameter in rack.named_parameters())
    write_folder(place / "model", rack.config, tensors, tokenizer_from=place / "tokenizer")
    add_plan(place / "model", LEVEL)
    return place / "model"


@pytest.fixture(scope="module")
def sparse_url(folder: Path) -> Iterator[str]:
    models = [
        LocalModel(name, load_engine(folder, EngineConfig(device="cpu", max_num_seqs=8, sparsity=sparsity)))
        for name, sparsity in (("sparse", LEVEL), ("dense", None))
    ]
    with served(make_app({model.id: model for model in models})) as address:
        yield address


def test_its_tokens_are_those_of_the_engine_offline(folder: Path, sparse_url: str) -> None:
    asked = {"prompt": PROMPTS, "temperature": 0, "max_tokens": 30}
    texts = {}
    for name in ("sparse", "dense"):
        answer = httpx2.post(f"{sparse_url}/v1/completions", json={"model": name, **asked}).json()
        texts[name] = [choice["text"] for choice in answer["choices"]]
    engine = load_engine(folder, EngineConfig(device="cpu", max_num_seqs=1, sparsity=LEVEL))
    expected = []
    for prompt in PROMPTS:
        ids = tuple(engine.tokenizer.encode(prompt, special_tokens=True))
        engine.add(Request(id="a", prompt=ids, sampling=Sampling(max_tokens=30, temperature=0)))
        expected.append("")
        while engine.has_work:
            expected[-1] += "".join(delta.text for delta in engine.step())
    assert texts["sparse"] == expected
    assert texts["dense"] != expected


def test_the_list_of_models_tells_the_level(sparse_url: str) -> None:
    listed = httpx2.get(f"{sparse_url}/v1/models").json()["data"]
    assert {entry["id"]: entry["sparsity"] for entry in listed} == {"sparse": LEVEL, "dense": None}
