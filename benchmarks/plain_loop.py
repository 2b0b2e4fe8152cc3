"""A training loop as one writes it by hand for one GPU: what raygrow's speed is held against.

It shares no code with raygrow's model, step or loop, and is free of what they must be able to do: no sharding, no
data loading (one batch, already on the GPU), no reports, no checkpoints. What made it faster when measured is in it:
the whole model in one graph (torch.compile), bf16 products over fp32 master weights, cuDNN's attention, rotary tables
made once, fused AdamW, and raygrow's chunked loss, 1 % faster than a compiled one over all logits. Query, key and value
in one product, or gate and up, were slower.

Shapes: B batch, T tokens, D model, N heads, H head dim, V vocabulary.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raygrow.nn.config import ModelConfig
from raygrow.nn.loss import linear_cross_entropy

ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
MATRICES = ("q", "k", "v", "out", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the plain loop runs; everything else about it is fixed."""

    batch_size: int
    """Sequences in an optimizer step."""
    micro_batch_size: int
    seq_len: int


class PlainModel(nn.Module):
    """The Llama of a ModelConfig (SwiGLU, RMSNorm, untied), with fp32 weights cast to bf16 where they are used."""

    cos_T1H: Tensor
    sin_T1H: Tensor

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        d, ff, layers = config.d_model, config.d_ff, config.n_blocks
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        shapes = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * config.init_std)

        self.embedding, self.head = matrix(config.vocab_size, d), matrix(config.vocab_size, d)
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: matrix(*shapes.get(name, (d, d))) for name in MATRICES}) for _ in range(layers)
        )
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(d)) for _ in range(2 * layers + 1))
        frequency = config.rope_theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles_TH = torch.outer(torch.arange(seq_len), frequency).repeat(1, 2)
        self.register_buffer("cos_T1H", angles_TH.cos().bfloat16()[:, None])
        self.register_buffer("sin_T1H", angles_TH.sin().bfloat16()[:, None])

    def normed(self, x_BTD: Tensor, index: int) -> Tensor:
        return F.rms_norm(x_BTD, (x_BTD.shape[-1],), self.norms[index].bfloat16(), self.eps)

    def rotated(self, x_BTNH: Tensor) -> Tensor:
        first, second = x_BTNH.chunk(2, dim=-1)
        return x_BTNH * self.cos_T1H + torch.cat((-second, first), dim=-1) * self.sin_T1H

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The final hidden states."""
        x_BTD = F.embedding(tokens_BT, self.embedding).bfloat16()
        for i, layer in enumerate(self.layers):
            q, k, v, out, gate, up, down = (layer.get_parameter(name).bfloat16() for name in MATRICES)
            h_BTD = self.normed(x_BTD, 2 * i)
            q, k, v = (F.linear(h_BTD, weight).unflatten(-1, (-1, self.head_dim)) for weight in (q, k, v))
            q, k, v = (part.transpose(1, 2) for part in (self.rotated(q), self.rotated(k), v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x_BTD = x_BTD + F.linear(attended, out)
            h_BTD = self.normed(x_BTD, 2 * i + 1)
            x_BTD = x_BTD + F.linear(F.silu(F.linear(h_BTD, gate)) * F.linear(h_BTD, up), down)
        return self.normed(x_BTD, -1)


class PlainLoop:
    """Model, optimizer and step."""

    def __init__(self, config: ModelConfig, settings: Settings, device: torch.device) -> None:
        assert (config.n_kv_heads, config.tie_embeddings, config.mlp) == (config.n_heads, False, "swiglu")
        self.settings, self.device = settings, device
        with device:
            self.model = PlainModel(config, settings.seq_len)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        self._trunk = torch.compile(self.model, fullgraph=True, dynamic=False)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed loss of one micro-batch."""
        hidden_ND = self._trunk(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self.model.head.bfloat16(), targets_BT.flatten())

    def step(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """One optimizer step; returns the mean loss, not waited for."""
        total = torch.zeros((), device=self.device)
        size = self.settings.micro_batch_size
        backends = sdpa_kernel(ATTENTION, set_priority=True)
        with backends if self.device.type == "cuda" else nullcontext():
            for tokens, targets in zip(tokens_BT.split(size), targets_BT.split(size), strict=True):
                loss = self.loss(tokens, targets) / tokens_BT.numel()
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def tokens_per_second(self, *, warmup: int, windows: int, window_steps: int) -> list[float]:
        """Speed of each window of steps, after `warmup` steps that are not counted."""
        shape = self.settings.batch_size, self.settings.seq_len + 1
        tokens_BT = torch.randint(0, len(self.model.embedding), shape, device=self.device)
        batch = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
        for _ in range(warmup):
            self.step(*batch)
        return [self._window(batch, window_steps) for _ in range(windows)]

    def _window(self, batch: tuple[Tensor, Tensor], steps: int) -> float:
        """Tokens per second of some steps in a row; the CPU may run ahead between them."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(*batch)
        self._wait()
        return steps * batch[0].numel() / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
