"""A model in other bases: the same function, with rotations and gains inside its weights.

Row vectors. Block l has the basis Q_l, and its residual stream is h Q_l. A norm without gains commutes with a rotation,
so its gains g go into the weights behind it:

    embedding             E Q_0
    q k v gate up router  W diag(g) Q_l             every expert alike; the router reads the same vector
    o                     Q_l^T W                   and its bias, where it has one, b Q_l
    down                  Q_m^T W                   m = l + 1: it writes in the next Block's basis; the last in its own
    adapter               Q_m^T Q_l                 a linear's weight is the transpose of what multiplies a row vector
    head                  W diag(g) Q_last          so a tied model gets a head of its own
    gains                 1

With the same Q everywhere the adapters are the identity and left out. Shapes: D model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.weights.rules import Rule, Rules, Stacked, Term
from raygrow.weights.shapes import parameter_shapes

_READS = ("q", "k", "v", "gate", "up", "router")
_WRITES = ("o", "down")


def absorbed_config(config: ModelConfig, rotation: Literal["global", "block"]) -> ModelConfig:
    """The config of a rotated model: with a head of its own.

    Raises:
        ValueError: If the model's norm has no gains that weights could take in.
    """
    return replace(config, rotation=rotation, tie_embeddings=False)


def absorb_rules(
    config: ModelConfig, bases: Sequence[Tensor], rotation: Literal["global", "block"], device: torch.device
) -> Rules:
    """How each tensor of the rotated model is made.

    Args:
        config: Of the model as it is.
        bases: One for each Block, `(D, D)` in fp64; for `global` all the same.
        rotation: Whether there are adapters.
        device: Where to compute. Results lie where the source's tensors do, in their dtype.
    """
    rules: dict[str, Rule | Stacked] = {}
    for name in parameter_shapes(absorbed_config(config, rotation)):
        *outer, module, kind = name.split(".")
        block = int(outer[1]) if outer[:1] == ["blocks"] else None
        source = "embedding.weight" if name == "head.weight" and config.tie_embeddings else name
        fill = None
        if module == "embedding":
            fill = Turned(device, reads=bases[0])
        elif module == "head":
            fill = Turned(device, reads=bases[-1], gains="norm.weight")
        elif module in ("attention_norm", "mlp_norm", "norm"):
            fill = Ones()
        elif block is not None and module == "adapter":
            # a transpose: Q_m^T Q_l is the weight of h -> h (Q_l^T Q_m)
            rules[name] = Rule(
                (), Product(device, bases[block + 1], bases[block], like=f"blocks.{block}.mlp_norm.weight")
            )
            continue
        elif block is not None and module in _READS and kind == "weight":
            norm = "attention_norm" if "attention" in outer else "mlp_norm"
            fill = Turned(device, reads=bases[block], gains=f"blocks.{block}.{norm}.weight")
        elif block is not None and module in _WRITES:
            after = bases[min(block + 1, config.n_blocks - 1) if module == "down" else block]
            fill = Turned(device, writes=after)
        if "experts" in outer:
            one_by_one = tuple(Rule((Term(source, gather=(expert,)),), fill) for expert in range(config.n_experts))
            rules[name] = Stacked(one_by_one)
        else:
            rules[name] = Rule((Term(source),), fill)
    return rules


@dataclass(frozen=True, eq=False)
class Turned:
    """A projection's weight or bias for another basis of what it reads or of what it writes."""

    device: torch.device
    reads: Tensor | None = None
    writes: Tensor | None = None
    gains: str | None = None
    """The norm before the projection."""

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is not None, "there is something to turn"
        wide = torch.float64 if value.dtype.itemsize >= 4 else torch.float32
        x = value.to(self.device, wide)
        if self.gains is not None:
            x = x * sources[self.gains].to(x)
        if self.reads is not None:
            x = x @ self.reads.to(x)
        if self.writes is not None:
            x = x @ self.writes.to(x) if x.ndim == 1 else self.writes.to(x).T @ x
        return x.to(value)


@dataclass(frozen=True, eq=False)
class Product:
    """`left^T @ right` of two bases."""

    device: torch.device
    left_DD: Tensor
    right_DD: Tensor
    like: str
    """A source tensor, whose dtype and device the product takes."""

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is None, "an adapter replaces nothing"
        return (self.left_DD.to(self.device).T @ self.right_DD.to(self.device)).to(sources[self.like])


@dataclass(frozen=True)
class Ones:
    """Gains that do nothing."""

    def apply(self, value: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        assert value is not None, "there were gains before"
        return torch.ones_like(value)
