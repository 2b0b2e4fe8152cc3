"""Tiny models of several shapes, as folders that transformers reads too, and requests to engines over them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raygrow.infer.config import EngineConfig
from raygrow.infer.engine import Engine
from raygrow.infer.load import load_engine
from raygrow.infer.request import Delta, Request
from raygrow.infer.sampling import Sampling
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import Tokenizer
from raygrow.weights.folder import write_folder

SHAPES = {
    "llama mha": {},
    "llama gqa tied": {"n_kv_heads": 2, "tie_embeddings": True},
    "mixtral gqa": {"n_kv_heads": 2, "n_experts": 4, "top_k": 2},
    "mixtral mha tied": {"n_experts": 3, "top_k": 2, "tie_embeddings": True},
    "qwen3 gqa": {"n_kv_heads": 2, "qk_norm": True},
}
MAX_TOKENS = 96


@dataclass(frozen=True)
class Subject:
    """A model folder and what transformers makes of it."""

    folder: Path
    reference: PreTrainedModel
    eos_id: int
    vocab_size: int

    def engine(self, **settings) -> Engine:
        return load_engine(self.folder, EngineConfig(**({"device": "cpu", "max_num_seqs": 4} | settings)))

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """What transformers' generate adds, the end of text included."""
        out = self.reference.generate(
            torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=self.eos_id, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """`(T, V)` of a full forward pass."""
        return self.reference(torch.tensor([tokens])).logits[0].log_softmax(-1)


def make_subject(shape: dict, tokenizer: Tokenizer, folder: Path) -> Subject:
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_heads": 4, "d_ff": 48} | shape,
        blocks_per_stack=3,
        max_seq_len=MAX_TOKENS,
        init_std=0.3,  # far from uniform, so that greedy tokens differ from step to step
    )
    model = Rack(config)
    init_weights(model, config, seed=3)
    return subject_of_model(model, tokenizer, folder)


def subject_of_model(model: Rack, tokenizer: Tokenizer, folder: Path) -> Subject:
    tokenizer.save(folder / "tokenizer")
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    path = write_folder(folder / "model", model.config, tensors, format="hf", tokenizer_from=folder / "tokenizer")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return Subject(path, reference, tokenizer.eos_id, tokenizer.vocab_size)


def request(id: str, prompt: list[int], **sampling) -> Request:
    return Request(id=id, prompt=tuple(prompt), sampling=Sampling(**({"temperature": 0.0} | sampling)))


def prompts(count: int, *, vocab_size: int, shortest: int = 1, longest: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def finish(engine: Engine, *, most_steps: int = 5000) -> dict[str, list[Delta]]:
    """Runs an engine until nothing is left. The Deltas of each request."""
    found: dict[str, list[Delta]] = {}
    for _ in range(most_steps):
        if not engine.has_work:
            return found
        for delta in engine.step():
            found.setdefault(delta.id, []).append(delta)
    raise AssertionError("the engine does not come to an end")


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@torch.no_grad()
def gaps(model: Rack, prompt: list[int], tokens: list[int]) -> Tensor:
    """How far below the best logit that of each chosen token is, in standard deviations of the logits there."""
    whole = torch.tensor([[*prompt, *tokens]], device=model.embedding.weight.device)
    logits_TV = model(whole)[0, len(prompt) - 1 : -1].float()
    gaps_T = logits_TV.amax(-1) - logits_TV.gather(1, whole[0, len(prompt) :, None])[:, 0]
    return gaps_T / logits_TV.std(-1)


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)
