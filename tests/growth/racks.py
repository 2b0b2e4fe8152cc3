"""Tiny Racks in which nothing is at its start: norms, biases and matrices are all random."""

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack

VOCABULARY = 50
TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def tiny(**settings) -> ModelConfig:
    """A model of three Blocks, d_model 16 and four heads, but for `settings`."""
    shape = {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 4, "d_ff": 24, "blocks_per_stack": 3}
    return ModelConfig(**{**shape, **settings})


def random_rack(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Rack:
    """Drawn in fp64, so that a Rack in fp32 is the rounded one."""
    generator = torch.Generator().manual_seed(0)
    model = Rack(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(float(is_norm), scale, generator=generator)
    return model.to(dtype)


def gradients(model: Rack) -> dict[str, Tensor]:
    """Of the cross entropy on fixed tokens, by the parameter's name."""
    model.zero_grad()
    model(TOKENS, TARGETS).nats.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
