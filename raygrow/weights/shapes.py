"""Which tensors a model holds, from its config alone."""

import torch

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack


def meta_rack(config: ModelConfig) -> Rack:
    """A Rack without storage: its parameters have names, shapes and dtypes only."""
    with torch.device("meta"):
        return Rack(config)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, in the order in which the Rack uses them."""
    return {name: parameter.shape for name, parameter in meta_rack(config).named_parameters()}
