"""Normalization layers, chosen by name."""

from torch import nn

from raygrow.nn.config import ModelConfig


def norm(config: ModelConfig, size: int) -> nn.Module:
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis, as `config.norm` says."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)
