"""Text from a model folder, one sequence at a time: for a look at what a run has learned, not for serving.

Shapes: B batch (always 1), T new tokens, S cached tokens, N heads, K key-value heads, H head dim, V vocabulary.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from raygrow.evaluate.record import choose_device
from raygrow.nn.attention import Attend, full_attention
from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import load_tokenizer
from raygrow.weights.folder import load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen.

    Raises:
        ValueError: If a field is out of range.
    """

    tokens: int = 200
    """To add at most."""
    temperature: float = 0.0
    """0 always takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must not be negative; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")


class KeyValueCache:
    """Keys and values of every Block for one sequence, in tensors made once for its longest length."""

    def __init__(self, config: ModelConfig, *, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_blocks, 1, max_tokens, config.n_kv_heads, config.head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        """Tokens held so far."""

    @property
    def attends(self) -> list[Attend]:
        """One attention function per Block: stores the new keys and values, attends to all so far."""
        return [partial(self._attend, block) for block in range(len(self._k))]

    def _attend(self, block: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        new = q_BTNH.shape[1]
        end = self.length + new
        self._k[block, :, self.length : end] = k_BTKH
        self._v[block, :, self.length : end] = v_BTKH
        # a single token may see all that is cached; the first pass is causal in itself
        return full_attention(q_BTNH, self._k[block, :, :end], self._v[block, :, :end], causal=new > 1)

    def forward(self, model: Rack, tokens: list[int]) -> Tensor:
        """Feeds new tokens: the whole prompt first, then one at a time. Returns the last one's logits, `(V,)`."""
        assert self.length == 0 or len(tokens) == 1
        device = self._k.device
        positions_T = torch.arange(self.length, self.length + len(tokens), device=device)
        logits_BTV = model(torch.tensor([tokens], device=device), positions_T=positions_T, attends=self.attends)
        self.length += len(tokens)
        return logits_BTV[0, -1]


@torch.no_grad()
def generate_tokens(model: Rack, prompt: list[int], sampling: SamplingConfig, *, eos_id: int | None) -> Iterator[int]:
    """Continues a prompt, token by token, until the end-of-text token (not given out), the limit or a full context.

    Raises:
        ValueError: If the model is bidirectional, or the prompt is empty or fills the context.
    """
    config, weight = model.config, model.embedding.weight
    if config.attention_mode != "causal":
        raise ValueError("attention_mode=bidirectional: this model cannot generate text from left to right")
    if not 0 < len(prompt) < config.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; this model takes 1 to {config.max_seq_len - 1}")
    room = min(sampling.tokens, config.max_seq_len - len(prompt))
    cache = KeyValueCache(config, max_tokens=len(prompt) + room, dtype=weight.dtype, device=weight.device)
    generator = torch.Generator().manual_seed(sampling.seed)
    new = prompt
    for _ in range(room):
        token = choose(cache.forward(model, new), sampling, generator)
        if token == eos_id:
            return
        yield token
        new = [token]


def choose(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """The next token. Draws on the CPU, so that a seed means the same on every device."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V, ids_V = (logits_V.float().cpu() / sampling.temperature).softmax(-1).sort(descending=True)
    # a token stays while those before it have not reached top_p: the likeliest one always does
    p_V[p_V.cumsum(-1) - p_V >= sampling.top_p] = 0
    return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])


def generate_text(model_folder: Path, prompt: str, sampling: SamplingConfig, *, device: str | None = None) -> str:
    """The continuation of a prompt by the model of a folder, without the prompt.

    An empty prompt starts a new document.

    Raises:
        FileNotFoundError: If the folder, its tensors or its tokenizer are missing.
        ValueError: If a file is damaged or the model cannot continue this prompt.
    """
    tokenizer = load_tokenizer(model_folder)
    place = choose_device(device)
    logger.info("generating with %s on %s", model_folder, place)
    model = load_model(model_folder, device=place).eval()
    ids = tokenizer.encode(prompt, special_tokens=True) or [tokenizer.eos_id]
    whole = [*ids, *generate_tokens(model, ids, sampling, eos_id=tokenizer.eos_id)]
    # together, because some tokenizers drop a space in front of the first token of a text
    return tokenizer.decode(whole)[len(tokenizer.decode(ids)) :]
