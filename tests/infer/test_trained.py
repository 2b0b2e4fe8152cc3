"""Models that have learned a language, and not only drawn ones: the tokens of transformers, dense and upcycled.

Shapes: B sequences, T tokens.
"""

import pytest
import torch

from raygrow.growth.experts import Experts
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer
from raygrow.weights.apply import apply_rules
from tests.infer.subjects import Subject, finish, prompts, request, subject_of_model, text_of, tokens_of

TEXTS = [f"def f{i}(x):\n    if x > {i % 7}:\n        return x + {i}\n    return f{i + 1}(x)\n\n" for i in range(60)]


def train(model: Rack, tokens: torch.Tensor, *, steps: int) -> float:
    """The loss per token of the last steps."""
    generator, losses = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 49, (8,), generator=generator)
        batch_BT = torch.stack([tokens[start : start + 49] for start in starts])
        loss = model(batch_BT[:, :-1], batch_BT[:, 1:].contiguous())
        balance = 0 if loss.balance is None else 0.01 * loss.balance
        ((loss.nats + balance) / (8 * 48)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.nats.detach()) / (8 * 48))
    return sum(losses[-10:]) / 10


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    """A model after some seconds of training, and a mixture of experts grown from it and trained on."""
    tokens = torch.tensor([id for ids in tokenizer.encode_batch(TEXTS) for id in [*ids, tokenizer.eos_id]])
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_ff=64,
        blocks_per_stack=2,
        max_seq_len=128,
    )
    dense = Rack(config)
    init_weights(dense, config, seed=0)
    assert train(dense, tokens, steps=100) < 0.6
    growth = Experts(n_experts=4, top_k=2, drop=0.5).grow(config)
    mixture = Rack(growth.config)
    weights = {name: tensor.clone() for name, tensor in apply_rules(growth.rules, dense.state_dict())}
    mixture.load_state_dict(weights)
    assert train(mixture, tokens, steps=40) < 0.6
    return {
        name: subject_of_model(model, tokenizer, tmp_path_factory.mktemp(name))
        for name, model in (("llama", dense), ("mixtral", mixture))
    }


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_greedy_tokens_of_trained_models(name: str, trained: dict[str, Subject], tokenizer: Tokenizer) -> None:
    subject = trained[name]
    assert subject.reference.config.model_type == name
    written = [tokenizer.encode(text[: 5 + 7 * i]) for i, text in enumerate(TEXTS[:8])]
    given = [*written, *prompts(4, vocab_size=subject.vocab_size, longest=40)]
    engine = subject.engine(async_scheduling=True, max_num_batched_tokens=29)
    for i, prompt in enumerate(given):
        engine.add(request(str(i), prompt, max_tokens=50))
    found = finish(engine)
    assert [tokens_of(found[str(i)]) for i in range(12)] == [subject.greedy(prompt, 50) for prompt in given]
    # as they have learned
    assert any(delta.finish_reason == "stop" for deltas in found.values() for delta in deltas)
    assert sum("return" in text_of(deltas) for deltas in found.values()) > 3
