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


def block_parameters(config: ModelConfig, block: int) -> int:
    """Parameters of one Block, all of its experts and its router included."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    attention = c.d_model * (2 * queries + 2 * keys)
    attention += (queries + 2 * keys + c.d_model) * c.attention_bias + 2 * c.head_dim * c.qk_norm
    if c.has_experts(block):
        mlp = c.n_experts * (_mlp_parameters(c, c.d_expert) + c.d_model)
    else:
        mlp = _mlp_parameters(c, c.d_ff)
    return attention + mlp + _adapter(c, block) + 2 * _norm_parameters(c)


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole Rack; a tied embedding counts once."""
    tables = 1 if config.tie_embeddings else 2
    blocks = sum(block_parameters(config, block) for block in range(config.n_blocks))
    return blocks + tables * config.vocab_size * config.d_model + _norm_parameters(config)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token goes through: all but the experts that it is not sent to."""
    idle = (config.n_experts - config.top_k) * _mlp_parameters(config, config.d_expert)
    return parameters(config) - idle * sum(config.has_experts(block) for block in range(config.n_blocks))


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


def block_flops(config: ModelConfig, block: int, seq_len: int) -> Flops:
    """FLOPs per token of one Block at a sequence length: of its router and the experts of a token, where it has any."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    attention = c.d_model * (2 * queries + 2 * keys)
    mlp = _mlp_matrices(c) * c.d_model * _active_hidden(c, block) + c.has_experts(block) * c.n_experts * c.d_model
    projections = 2 * (attention + mlp + _adapter(c, block))
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
    head = head_flops(config)
    total, below = 0.0, trains("embedding")
    for index in range(config.n_blocks):
        block, own = block_flops(config, index, seq_len), trains(f"blocks.{index}")
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
    largest_block = max(block_parameters(c, block) for block in range(c.n_blocks))
    gathered = 2 * size * max(largest_block, 2 * c.vocab_size * c.d_model)
    kept_per_token = sum(_kept_values(c, block) for block in range(c.n_blocks)) + 2 * c.d_model
    logits = 512 * 2**20
    return state + gathered + size * kept_per_token * micro_batch_tokens + logits


def peak_flops(device_name: str) -> float | None:
    """The datasheet peak of a device, or None where it is not known (no MFU is reported then)."""
    return next((peak for word, peak in PEAK_FLOPS.items() if word in device_name), None)


def _norm_parameters(config: ModelConfig) -> int:
    return config.d_model * (1 if config.norm == "rmsnorm" else 2)


def _adapter(config: ModelConfig, block: int) -> int:
    """Parameters between a Block's basis and the next one's."""
    return config.has_adapter(block) * config.d_model**2


def _mlp_matrices(config: ModelConfig) -> int:
    return 3 if config.gated else 2


def _mlp_parameters(config: ModelConfig, d_hidden: int) -> int:
    """Of one MLP or one expert."""
    c, matrices = config, _mlp_matrices(config)
    return matrices * c.d_model * d_hidden + ((matrices - 1) * d_hidden + c.d_model) * c.mlp_bias


def _active_hidden(config: ModelConfig, block: int) -> int:
    """Hidden units that a token goes through in the MLP of a Block."""
    return config.top_k * config.d_expert if config.has_experts(block) else config.d_ff


def _kept_values(config: ModelConfig, block: int) -> int:
    """Values of a token that a Block keeps for its backward pass."""
    c = config
    queries, keys = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    hidden = 3 if c.gated else 2
    # each of a token's experts has its own copy of the token's row, and of its output's
    copies = 2 * c.top_k * c.d_model if c.has_experts(block) else 0
    return (4 + c.has_adapter(block)) * c.d_model + 2 * queries + 4 * keys + copies + hidden * _active_hidden(c, block)
