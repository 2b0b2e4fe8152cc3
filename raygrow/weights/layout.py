"""How the parameters of a model lie in a folder: the names and shapes stored, and the rules to and from them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from raygrow.nn.config import ModelConfig
from raygrow.weights.rules import Rule, Rules, copy_rule
from raygrow.weights.shapes import parameter_shapes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store the parameters of one model."""

    shapes: Mapping[str, torch.Size]
    """Name and shape of every stored tensor."""
    load: Rules
    """How each parameter is made from what is stored."""
    store: Mapping[str, Rule]
    """How what is stored is made from the parameters, each tensor from a single one."""


def own_layout(config: ModelConfig) -> Layout:
    """Raygrow's own: every parameter as it is, under its name."""
    shapes = parameter_shapes(config)
    copies = {name: copy_rule(name) for name in shapes}
    return Layout(shapes=shapes, load=copies, store=copies)
