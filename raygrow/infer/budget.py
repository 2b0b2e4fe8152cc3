"""How much memory the key-value cache may take when nobody says."""

import logging
import os
from pathlib import Path

import torch

from raygrow.infer.config import EngineConfig
from raygrow.nn.rack import Rack

logger = logging.getLogger(__name__)

CUDA_SHARE = 0.9
"""Of a device's memory that weights, activations and cache take together."""
HOST_SHARE = 0.5
"""Of the host's free memory."""
ROUNDING = 2**22
"""Bytes by which pages may exceed the tokens of one slot in one tensor, at most."""


def cache_budget(model: Rack, config: EngineConfig, max_tokens: int) -> int:
    """Bytes for the cache: what is asked for, or what is free, but not more than full slots can take."""
    if config.kv_cache_memory_bytes != "auto":
        return config.kv_cache_memory_bytes
    weight, shape = model.embedding.weight, model.config
    row_bytes = max_tokens * shape.n_kv_heads * shape.head_dim * weight.element_size() + ROUNDING
    full = 2 * shape.n_blocks * (config.max_num_seqs + 1) * row_bytes
    free = _free_on_cuda(model, config) if weight.is_cuda else int(HOST_SHARE * _free_on_host())
    budget = min(full, free)
    logger.info("KV cache: up to %.1f GiB", budget / 2**30)
    return budget


@torch.inference_mode()
def _free_on_cuda(model: Rack, config: EngineConfig) -> int:
    """What is left beside the weights and the activations of the largest step, which is tried out."""
    device = model.embedding.weight.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    tokens = torch.zeros(1, config.max_num_batched_tokens, dtype=torch.int64, device=device)
    logits = model(tokens, rows=torch.arange(config.max_num_seqs, device=device))
    logits.float().softmax(-1).cumsum(-1)
    del logits
    peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - peak - (1 - CUDA_SHARE) * total))


def _free_on_host() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return free if limit is None else max(0, min(free, limit - (used or 0)))


def _number(file: Path) -> int | None:
    """A control group's number; None where there is no limit or no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
