"""What a Hugging Face model stores under which name. An expert of a mixture is a tensor of its own there; in raygrow it
is a slice of a stacked one.
"""

import re

from raygrow.nn.config import ModelConfig
from raygrow.weights.apply import apply_rules
from raygrow.weights.hf.config import family_of
from raygrow.weights.hf.family import Family
from raygrow.weights.layout import Layout
from raygrow.weights.rules import Rule, Stacked, Term, copy_rule
from raygrow.weights.shapes import meta_rack

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE_BLOCKS = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": HEAD}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def hf_layout(config: ModelConfig) -> Layout:
    """The names that `save_pretrained` gives, in transformers 4 and 5.

    Raises:
        ValueError: If no family can hold the model; names the field.
    """
    family, load, store = family_of(config), {}, {}
    parameters = dict(meta_rack(config).named_parameters())
    for name in parameters:
        stored = _stored_name(name, family)
        if "{expert}" in stored:
            experts = [stored.format(expert=i) for i in range(config.n_experts)]
            load[name] = Stacked(tuple(map(copy_rule, experts)))
            store |= {expert: Rule((Term(name, gather=(i,)),)) for i, expert in enumerate(experts)}
        else:
            load[name] = copy_rule(stored)
            store[stored] = copy_rule(name)
    shapes = {name: tensor.shape for name, tensor in apply_rules(store, parameters)}
    return Layout(shapes=shapes, load=load, store=store)


def is_derived(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor says nothing new: rotary tables of old checkpoints, or the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD)


def _stored_name(name: str, family: Family) -> str:
    """The name of a parameter; with `{expert}` in it where each of its experts has one."""
    if match := _BLOCK.fullmatch(name):
        return f"model.layers.{match[1]}.{family.modules[match[2]]}.{match[3]}"
    return _OUTSIDE_BLOCKS[name]
