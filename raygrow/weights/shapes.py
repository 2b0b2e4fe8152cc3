"""Which tensors a model holds, from its config alone."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack


class _SkipInit(TorchFunctionMode):
    """Leaves out `torch.nn.init`: there is nothing to fill on meta, and its random functions import a second's worth
    of compiler there.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def meta_rack(config: ModelConfig) -> Rack:
    """A Rack without storage: its parameters have names, shapes and dtypes only."""
    with torch.device("meta"), _SkipInit():
        return Rack(config)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter, in the order in which the Rack uses them."""
    return {name: parameter.shape for name, parameter in meta_rack(config).named_parameters()}
