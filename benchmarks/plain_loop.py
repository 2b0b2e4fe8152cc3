"""A training loop as one writes it by hand for one GPU: what raygrow's speed is held against.

It shares no code with raygrow's model, step or loop. Everything that made it faster when measured is in it: the whole
model in one graph (torch.compile), bf16 products over fp32 master weights, query, key and value in one product, gate
and up in one, cuDNN's attention, fused AdamW. The loss is chosen per setting: `compiled` keeps all logits and leaves
their cross entropy to the compiler; `chunked` is raygrow's, which never holds them.

Shapes: B batch, T tokens, D model, F hidden, N heads, H head dim, V vocabulary.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raygrow.nn.config import ModelConfig
from raygrow.nn.loss import linear_cross_entropy

ATTENTION = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the plain loop runs; everything else about it is fixed."""

    batch_size: int
    """Sequences in an optimizer step."""
    micro_batch_size: int
    seq_len: int
    attention: Literal["cudnn", "flash"] = "cudnn"
    loss: Literal["compiled", "chunked"] = "chunked"
    dtype: torch.dtype = torch.bfloat16


class PlainModel(nn.Module):
    """The Llama of a ModelConfig (SwiGLU, RMSNorm, untied), with fp32 weights cast where they are used."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        d, ff, layers = config.d_model, config.d_ff, config.n_blocks
        self.head_dim, self.theta, self.eps, self.dtype = config.head_dim, config.rope_theta, config.norm_eps, dtype
        out_std = config.init_std / (2 * layers) ** 0.5

        def matrix(*shape: int, std: float = config.init_std) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * std)

        self.embedding, self.head = matrix(config.vocab_size, d), matrix(config.vocab_size, d)
        self.qkv = nn.ParameterList(matrix(3 * d, d) for _ in range(layers))
        self.out = nn.ParameterList(matrix(d, d, std=out_std) for _ in range(layers))
        self.gate_up = nn.ParameterList(matrix(2 * ff, d) for _ in range(layers))
        self.down = nn.ParameterList(matrix(d, ff, std=out_std) for _ in range(layers))
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(d)) for _ in range(2 * layers + 1))

    def normed(self, x_BTD: Tensor, index: int) -> Tensor:
        wide = x_BTD.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.norms[index]).to(self.dtype)

    def rotated(self, x_BTNH: Tensor) -> Tensor:
        half = self.head_dim // 2
        frequency = self.theta ** (-torch.arange(half, device=x_BTNH.device) / half)
        angle = torch.outer(torch.arange(x_BTNH.shape[1], device=x_BTNH.device), frequency)[:, None]
        first, second = x_BTNH.float().split(half, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(self.dtype)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The final hidden states."""
        x_BTD = F.embedding(tokens_BT, self.embedding).to(self.dtype)
        layers = zip(self.qkv, self.out, self.gate_up, self.down, strict=True)
        for i, (qkv, out, gate_up, down) in enumerate(layers):
            heads = F.linear(self.normed(x_BTD, 2 * i), qkv.to(self.dtype)).unflatten(-1, (3, -1, self.head_dim))
            q, k, v = heads.unbind(2)
            q, k, v = (part.transpose(1, 2) for part in (self.rotated(q), self.rotated(k), v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x_BTD = x_BTD + F.linear(attended, out.to(self.dtype))
            gate, up = F.linear(self.normed(x_BTD, 2 * i + 1), gate_up.to(self.dtype)).chunk(2, dim=-1)
            x_BTD = x_BTD + F.linear(F.silu(gate) * up, down.to(self.dtype))
        return self.normed(x_BTD, -1)


class PlainLoop:
    """Model, optimizer and step."""

    def __init__(self, config: ModelConfig, settings: Settings, device: torch.device) -> None:
        assert config.n_kv_heads == config.n_heads and not config.tie_embeddings and config.mlp == "swiglu"
        self.settings, self.device = settings, device
        with device:
            self.model = PlainModel(config, settings.dtype)
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), **fused)
        self._trunk = torch.compile(self.model, fullgraph=True, dynamic=False)
        self._compiled_loss = torch.compile(self._full_logits_loss, fullgraph=True, dynamic=False)

    def _full_logits_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = F.linear(self.model(tokens_BT), self.model.head.to(self.settings.dtype))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed loss of one micro-batch."""
        if self.settings.loss == "compiled":
            return self._compiled_loss(tokens_BT, targets_BT)
        hidden_ND = self._trunk(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.model.head.to(self.settings.dtype), targets_BT.flatten())

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """One optimizer step; returns the mean loss, not waited for."""
        total = torch.zeros((), device=self.device)
        size = self.settings.micro_batch_size
        backends = sdpa_kernel(ATTENTION[self.settings.attention], set_priority=True)
        with backends if self.device.type == "cuda" else nullcontext():
            for tokens, targets in zip(tokens_BT.split(size), targets_BT.split(size), strict=True):
                loss = self.loss(tokens, targets) / tokens_BT.numel()
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def tokens_per_second(self, batches: Iterator[tuple[Tensor, Tensor]], *, warmup: int, steps: int) -> float:
        """Median over single steps, after `warmup` steps that are not counted."""
        times = []
        for step in range(warmup + steps):
            batch = [part.to(self.device) for part in next(batches)]
            self._wait()
            start = time.perf_counter()
            self.step(*batch)
            self._wait()
            if step >= warmup:
                times.append(time.perf_counter() - start)
        return self.settings.batch_size * self.settings.seq_len / statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
