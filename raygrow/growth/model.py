"""Growing a model in memory: a Rack, or a transformers LlamaForCausalLM."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from raygrow.growth.gstack import Gstack
from raygrow.growth.operator import GrowthConfig
from raygrow.nn.rack import Rack
from raygrow.weights.apply import Derived, apply_rules
from raygrow.weights.hf import from_hf_config, hf_name
from raygrow.weights.rules import copy_rule
from raygrow.weights.shapes import meta_rack, parameter_shapes

Model = TypeVar("Model", bound=nn.Module)


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
    """The grown copy of a Rack or of a transformers `LlamaForCausalLM`.

    Raises:
        TypeError: If the model is of another kind.
        ValueError: If it is a Llama with something that raygrow's has not.
    """
    if isinstance(model, Rack):
        grown: Any = _grow_rack(model, operator)
    elif getattr(getattr(model, "config", None), "model_type", None) == "llama" and hasattr(model, "lm_head"):
        grown = _grow_llama(model, operator)
    else:
        raise TypeError(f"a Rack or a LlamaForCausalLM can be grown, not a {type(model).__name__}")
    return grown.train(model.training)


def _grow_rack(model: Rack, operator: GrowthConfig) -> Rack:
    growth = operator.grow(model.config)
    target = meta_rack(growth.config)
    sources = dict(model.named_parameters())
    tensors = {name: tensor.detach().clone() for name, tensor in apply_rules(growth.rules, sources)}
    target.load_state_dict(tensors, assign=True)
    return target


def _grow_llama(model: Any, operator: GrowthConfig) -> Any:
    # no import of transformers: the model brings its own classes
    config = from_hf_config(model.config.to_dict())
    growth = operator.grow(config)
    to_raygrow = {name: copy_rule(hf_name(name)) for name in parameter_shapes(config)}
    sources = Derived(to_raygrow, dict(model.named_parameters()))
    tensors = {hf_name(name): tensor.detach().clone() for name, tensor in apply_rules(growth.rules, sources)}

    hf_config = copy.deepcopy(model.config)
    hf_config.num_hidden_layers = growth.config.n_blocks
    with torch.device("meta"):
        target = type(model)(hf_config)
    target.load_state_dict(tensors, assign=True, strict=not growth.config.tie_embeddings)
    target.tie_weights()
    # what no state dict holds: tables that do not depend on depth, and how to generate
    target.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    target.generation_config = copy.deepcopy(model.generation_config)
    return target
