"""Growing a model in memory: a Rack, or a dense Llama or Qwen3 of transformers."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from raygrow.growth.gstack import Gstack
from raygrow.growth.operator import GrowthConfig
from raygrow.nn.rack import Rack
from raygrow.weights.apply import Derived, apply_rules
from raygrow.weights.hf.config import from_hf_config, updated_hf_config
from raygrow.weights.hf.layout import hf_layout
from raygrow.weights.shapes import meta_rack

Model = TypeVar("Model", bound=nn.Module)

_TRANSFORMERS = ("llama", "qwen3")


def gstack(model: Model, growth_factor: int = 4) -> Model:
    """A model `growth_factor` times as deep, made of copies of `model` (see `Gstack`).

    Args:
        model: A Rack or a transformers `LlamaForCausalLM`; it is not changed and shares nothing with the result.
        growth_factor: How many copies; 1 gives a plain copy.

    Returns:
        A model of the same kind, dtype and device.
    """
    return grow_model(model, Gstack(factor=growth_factor))


def grow_model(model: Model, operator: GrowthConfig) -> Model:
    """The grown copy of a model, e.g. `grow_model(model, Width(factor=2))`.

    Args:
        model: A Rack, or a `LlamaForCausalLM` or `Qwen3ForCausalLM` of transformers; it is not changed and shares
            nothing with the result.
        operator: What to do.

    Returns:
        A model of the same kind, dtype and device.

    Raises:
        TypeError: If the model is of another kind, or the grown one would be.
        ValueError: If the operator cannot grow this model, or it has something that raygrow's models have not.
    """
    if isinstance(model, Rack):
        grown: Any = _grow_rack(model, operator)
    elif getattr(getattr(model, "config", None), "model_type", None) in _TRANSFORMERS and hasattr(model, "lm_head"):
        grown = _grow_transformers(model, operator)
    else:
        raise TypeError(
            f"a Rack, a LlamaForCausalLM or a Qwen3ForCausalLM can be grown, not a {type(model).__name__}; of "
            "transformers' mixtures of experts, grow the folder (raygrow grow)"
        )
    return grown.train(model.training)


def _grow_rack(model: Rack, operator: GrowthConfig) -> Rack:
    growth = operator.grow(model.config)
    target = meta_rack(growth.config)
    sources = dict(model.named_parameters())
    tensors = {name: tensor.detach().clone() for name, tensor in apply_rules(growth.rules, sources)}
    target.load_state_dict(tensors, assign=True)
    return target


def _grow_transformers(model: Any, operator: GrowthConfig) -> Any:
    # no import of transformers: the model brings its own classes
    settings = model.config.to_dict()
    config = from_hf_config(settings)
    growth = operator.grow(config)
    if growth.config.n_experts:
        raise TypeError(
            f"a {type(model).__name__} has no place for experts: save it and grow the folder instead "
            "(raygrow grow, or raygrow.growth.folder.grow_folder), which gives a model of another class"
        )
    hf_config = copy.deepcopy(model.config)
    for key, value in updated_hf_config(settings, growth.config).items():
        if settings.get(key) != value:
            setattr(hf_config, key, value)
    sources = Derived(hf_layout(config).load, dict(model.named_parameters()))
    grown = apply_rules(hf_layout(growth.config).store, Derived(growth.rules, sources))
    tensors = {name: tensor.detach().clone() for name, tensor in grown}

    with torch.device("meta"):
        target = type(model)(hf_config)
    target.load_state_dict(tensors, assign=True, strict=not growth.config.tie_embeddings)
    target.tie_weights()
    # what no state dict holds: tables that depend on the size of a head alone, and how to generate
    target.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    target.generation_config = copy.deepcopy(model.generation_config)
    return target
