from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch

from raygrow.evaluate.generate import generate_text
from raygrow.infer.engine import Engine
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer, load_tokenizer
from raygrow.weights.folder import load_model, write_folder

GREEDY = Sampling(max_tokens=30, temperature=0.0)


@torch.no_grad()
def recomputed(model: Rack, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens without a cache: the whole sequence at every step."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def text(folder: Path, prompt: str, sampling: Sampling) -> str:
    return "".join(generate_text(folder, prompt, sampling, device="cpu"))


def test_text_is_that_of_the_recomputed_tokens(model_folder: Path, model: Rack, tokenizer: Tokenizer):
    ids = tokenizer.encode("def f")
    new = recomputed(model, ids, 30)
    assert text(model_folder, "def f", replace(GREEDY, ignore_eos=True)) == tokenizer.decode([*ids, *new])[5:]
    assert len(set(new)) > 3


@pytest.mark.parametrize("pieces", [1, 100])
def test_memory_is_given_back_at_the_end_or_before(model_folder: Path, monkeypatch: pytest.MonkeyPatch, pieces: int):
    closed = []
    monkeypatch.setattr(Engine, "close", lambda engine: closed.append(engine))
    text = generate_text(model_folder, "def f", GREEDY, device="cpu")
    for _ in islice(text, pieces):
        assert not closed
    text.close()  # type: ignore[attr-defined]
    assert len(closed) == 1


def test_a_seed_gives_the_same_text(model_folder: Path):
    sampling = Sampling(max_tokens=20, top_p=0.9, seed=1)
    once = text(model_folder, "def f", sampling)
    assert once == text(model_folder, "def f", sampling)
    assert once != text(model_folder, "def f", replace(sampling, seed=2))
    assert text(model_folder, "", replace(GREEDY, ignore_eos=True))


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """A model whose tokenizer is of Llama's kind: a token begins each text, and words begin with their space."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(60))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = ModelConfig(vocab_size=63, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=1, max_seq_len=16)
    model = Rack(config)
    init_weights(model, config, seed=0)
    return write_folder(tmp_path / "model", config, model.named_parameters(), tokenizer_from=tmp_path)


def test_a_prompt_begins_as_the_tokenizer_has_it_and_words_keep_their_spaces(sentencepiece_folder: Path):
    model, tokenizer = load_model(sentencepiece_folder), load_tokenizer(sentencepiece_folder)
    new = recomputed(model, [1, 5, 6], 4)
    found = text(sentencepiece_folder, "w2 w3", replace(GREEDY, max_tokens=4))
    assert "w2 w3" + found == tokenizer.decode([5, 6, *new])
    assert found.startswith(" w")


def test_prompts_that_cannot_be_continued(model_folder: Path, model: Rack, config: ModelConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens; this model takes 1 to 47"):
        text(model_folder, "def f(x): " * 48, GREEDY)
    both_ways = replace(config, attention_mode="bidirectional")
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    folder = write_folder(tmp_path / "both", both_ways, tensors, tokenizer_from=model_folder)
    with pytest.raises(ValueError, match="attention_mode=bidirectional"):
        text(folder, "def", GREEDY)


def test_a_model_without_numbers_says_so(model_folder: Path, model: Rack, config: ModelConfig, tmp_path: Path):
    tensors = ((name, parameter.detach() * torch.nan) for name, parameter in model.named_parameters())
    folder = write_folder(tmp_path / "nan", config, tensors, tokenizer_from=model_folder)
    with pytest.raises(ValueError, match="outputs are not numbers"):
        text(folder, "def", GREEDY)
