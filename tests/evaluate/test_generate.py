from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from raygrow.evaluate.generate import KeyValueCache, SamplingConfig, choose, generate_text, generate_tokens
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer, load_tokenizer
from raygrow.weights.folder import load_model, write_folder

PROMPT = [5, 17, 200, 31]


@torch.no_grad()
def recomputed(model: Rack, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens without a cache: the whole sequence at every step."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_cached_tokens_equal_recomputed_ones(model: Rack):
    sampling = SamplingConfig(tokens=30)
    cached = list(generate_tokens(model, PROMPT, sampling, eos_id=None))
    assert cached == recomputed(model, PROMPT, 30)
    assert len(set(cached)) > 3


def test_cached_logits_equal_a_full_pass(model: Rack, config: ModelConfig):
    tokens = torch.arange(40) * 7 % config.vocab_size
    cache = KeyValueCache(config, max_tokens=40, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        full_TV = model(tokens[None])[0]
        cache.forward(model, tokens[:25].tolist())
        stepped_TV = torch.stack([cache.forward(model, [token]) for token in tokens[25:].tolist()])
    assert torch.allclose(stepped_TV, full_TV[25:], atol=1e-4 * float(full_TV.abs().max()))


def test_generation_ends_at_end_of_text_and_at_a_full_context(model: Rack, config: ModelConfig):
    sampling = SamplingConfig(tokens=1000)
    whole = list(generate_tokens(model, PROMPT, sampling, eos_id=None))
    assert len(whole) == config.max_seq_len - len(PROMPT)
    stop = whole[4]
    assert list(generate_tokens(model, PROMPT, sampling, eos_id=stop)) == whole[: whole.index(stop)]


def test_a_seed_gives_the_same_text(model_folder: Path):
    sampling = SamplingConfig(tokens=20, temperature=1.0, top_p=0.9, seed=1)
    text = generate_text(model_folder, "def f", sampling, device="cpu")
    assert text == generate_text(model_folder, "def f", sampling, device="cpu")
    assert text != generate_text(model_folder, "def f", replace(sampling, seed=2), device="cpu")
    assert generate_text(model_folder, "", SamplingConfig(tokens=3), device="cpu")


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
    sampling = SamplingConfig(tokens=4)
    new = list(generate_tokens(model, [1, 5, 6], sampling, eos_id=None))
    text = generate_text(sentencepiece_folder, "w2 w3", sampling, device="cpu")
    assert "w2 w3" + text == tokenizer.decode([5, 6, *new])
    assert text.startswith(" w")


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        sampling = SamplingConfig(temperature=1.0, top_p=top_p)
        return {choose(logits, sampling, generator) for _ in range(300)}

    assert drawn(0.4) == {0}
    assert drawn(0.7) == {0, 2}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_draws_follow_the_probabilities():
    logits, generator = torch.tensor([0.7, 0.2, 0.1]).log(), torch.Generator().manual_seed(0)
    sampling = SamplingConfig(temperature=1.0)
    drawn = torch.bincount(torch.tensor([choose(logits, sampling, generator) for _ in range(3000)]), minlength=3)
    assert torch.allclose(drawn / 3000, torch.tensor([0.7, 0.2, 0.1]), atol=0.03)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_wrong_settings_are_named(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_continued(model: Rack, config: ModelConfig, tokenizer: Tokenizer):
    sampling = SamplingConfig()
    with pytest.raises(ValueError, match="the prompt has 48 tokens; this model takes 1 to 47"):
        next(generate_tokens(model, [1] * 48, sampling, eos_id=tokenizer.eos_id))
    both_ways = Rack(replace(config, attention_mode="bidirectional"))
    with pytest.raises(ValueError, match="attention_mode=bidirectional"):
        next(generate_tokens(both_ways, PROMPT, sampling, eos_id=tokenizer.eos_id))
