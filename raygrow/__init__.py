"""Pre-train language models by growth: train a small one, grow it, go on training.

The names below load on first use, so that `import raygrow` needs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raygrow.config import RunConfig as RunConfig
    from raygrow.growth.depth import Depth as Depth
    from raygrow.growth.experts import Experts as Experts
    from raygrow.growth.gstack import Gstack as Gstack
    from raygrow.growth.model import grow_model as grow_model
    from raygrow.growth.model import gstack as gstack
    from raygrow.growth.timing import growth_timing as growth_timing
    from raygrow.growth.width import Width as Width
    from raygrow.nn.config import ModelConfig as ModelConfig
    from raygrow.nn.rack import Rack as Rack
    from raygrow.weights.folder import load_model as load_model

_HOMES = {
    "RunConfig": "raygrow.config",
    "Depth": "raygrow.growth.depth",
    "Experts": "raygrow.growth.experts",
    "Gstack": "raygrow.growth.gstack",
    "Width": "raygrow.growth.width",
    "grow_model": "raygrow.growth.model",
    "gstack": "raygrow.growth.model",
    "growth_timing": "raygrow.growth.timing",
    "ModelConfig": "raygrow.nn.config",
    "Rack": "raygrow.nn.rack",
    "load_model": "raygrow.weights.folder",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raygrow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
