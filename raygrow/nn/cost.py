"""Parameters, FLOPs and memory of a model, from its config alone.

Conventions: a multiply-add is 2 FLOPs; matrix products count 2 x weights used, the LM head included; attention scores
and their use count the causal half; norms, activations and the embedding lookup count nothing. A backward pass has two
products for each forward one: the gradient of the input and that of the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

from raygrow.nn.config import ModelConfig

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 datasheet peaks in FLOP/s, by a word of the device's name. MFU is a share of these."""


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one Block."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    attention = c.d_model * (2 * queries + 2 * keys)
    attention += (queries + 2 * keys + c.d_model) * c.attention_bias + 2 * c.head_dim * c.qk_norm
    matrices = 3 if c.mlp == "swiglu" else 2
    mlp = matrices * c.d_model * c.d_ff + ((matrices - 1) * c.d_ff + c.d_model) * c.mlp_bias
    return attention + mlp + 2 * _norm_parameters(c)


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole Rack; a tied embedding counts once."""
    tables = 1 if config.tie_embeddings else 2
    return (
        config.n_blocks * block_parameters(config)
        + tables * config.vocab_size * config.d_model
        + _norm_parameters(config)
    )


@dataclass(frozen=True)
class Flops:
    """FLOPs per token of one Block, or of all that is not a Block."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def training(self) -> float:
        """Forward and both gradients."""
        return self.forward + self.input_gradient + self.weight_gradient


def block_flops(config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs per token of one Block at a sequence length."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    matrices = 3 if c.mlp == "swiglu" else 2
    projections = 2 * c.d_model * (2 * queries + 2 * keys + matrices * c.d_ff)
    attended = seq_len / 2 if c.attention_mode == "causal" else seq_len
    scores = 2 * 2 * queries * attended
    # scores have no weights: both their gradient products are gradients of inputs
    return Flops(projections + scores, projections + 2 * scores, projections)


def head_flops(config: ModelConfig) -> Flops:
    """FLOPs per token of the LM head."""
    product = 2 * config.d_model * config.vocab_size
    return Flops(product, product, product)


def training_flops_per_token(
    config: ModelConfig, seq_len: int, *, trains: Callable[[str], bool] = lambda unit: True
) -> float:
    """Forward and backward FLOPs of one training token.

    Args:
        config: The model.
        seq_len: Tokens in a sequence.
        trains: Whether anything in a unit (`embedding`, `blocks.3`, `head`) trains. A frozen unit needs no gradient of
            its weights, and none of its input where nothing below it trains.
    """
    block, head = block_flops(config, seq_len), head_flops(config)
    total, below = 0.0, trains("embedding")
    for index in range(config.n_blocks):
        own = trains(f"blocks.{index}")
        below = below or own
        total += block.forward + below * block.input_gradient + own * block.weight_gradient
    own = trains("embedding" if config.tie_embeddings else "head")
    return total + head.forward + below * head.input_gradient + own * head.weight_gradient


def training_memory(
    config: ModelConfig, *, micro_batch_tokens: int, workers: int, mixed_precision: bool, accumulates: bool
) -> int:
    """Bytes a worker needs to train under FSDP without activation checkpointing: an estimate.

    Weights, gradients, m and v are fp32 and sharded; one Block's gathered weights and gradients, the activations kept
    for the backward pass and the chunk of logits are each worker's own, and so are the whole fp32 gradients where a
    step has several micro-batches. On an H200 it came out 12 to 18 % above what two models of 0.14B and 1.4B took.
    """
    c = config
    size = 2 if mixed_precision else 4
    state = 16 * parameters(c) // workers + 4 * parameters(c) * (accumulates and workers > 1)
    gathered = 2 * size * max(block_parameters(c), 2 * c.vocab_size * c.d_model)
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    hidden = 3 if c.mlp == "swiglu" else 2
    kept_per_token = c.n_blocks * (4 * c.d_model + 2 * queries + 4 * keys + hidden * c.d_ff) + 2 * c.d_model
    logits = 512 * 2**20
    return state + gathered + size * kept_per_token * micro_batch_tokens + logits


def peak_flops(device_name: str) -> float | None:
    """The datasheet peak of a device, or None where it is not known (no MFU is reported then)."""
    return next((peak for word, peak in PEAK_FLOPS.items() if word in device_name), None)


def _norm_parameters(config: ModelConfig) -> int:
    return config.d_model * (1 if config.norm == "rmsnorm" else 2)
