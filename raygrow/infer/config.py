"""How an engine is set up. The names are those of vLLM's engine arguments, which Ray Serve's YAML files give."""

from dataclasses import dataclass
from typing import Literal

from raygrow.nn.config import ModelConfig

DType = Literal["auto", "float32", "bfloat16"]
LayoutChoice = Literal["auto", "block", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and choices of an engine.

    Raises:
        ValueError: If a field is out of range; names the field and its value.
    """

    max_num_seqs: int = 64
    """Sequences that run at once: slots of the key-value cache."""
    max_model_len: int | None = None
    """Longest sequence, prompt and answer together; the model's `max_seq_len`, the most there is, when not given."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step: one of each running sequence first, then of prompts."""
    kv_cache_memory_bytes: int | Literal["auto"] = "auto"
    """Keys and values may take this much memory, and no more."""
    dtype: DType = "auto"
    """Of weights and cache; `auto` is bfloat16 on CUDA and as stored elsewhere."""
    device: str | None = None
    """CUDA where there is one, when not given."""
    enable_prefix_caching: bool = True
    """Take the beginning of a prompt from a sequence that began alike."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    async_scheduling: bool | None = None
    """Begin a step before the texts of the one before are made; on CUDA, which computes meanwhile, when not given."""
    kv_layout: LayoutChoice = "auto"
    """How Blocks share pages: each has its own (`block`), or all share them (`interleaved`), which takes a tenth of the
    driver's calls and wastes less of a sequence's last page. `auto` is interleaved on CUDA: steps take as long."""
    sparsity: float | None = None
    """Tokens of answers skip this share of the Blocks' weights; a level of a model that `raygrow sparsify` has made.
    Dense when not given, or 0."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every running sequence gets its token in each step"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity:g}: must be at least 0 and below 1")
        for name, choices in (
            ("dtype", DType.__args__),
            ("kv_layout", LayoutChoice.__args__),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of the longest sequence that an engine is to take, prompt and answer together.

    Raises:
        ValueError: If the model does not take as many; names the number that was asked for.
    """
    wanted = config.max_model_len or model.max_seq_len
    if wanted > model.max_seq_len:
        raise ValueError(f"max_model_len={wanted}: this model takes {model.max_seq_len} tokens at most")
    return wanted
