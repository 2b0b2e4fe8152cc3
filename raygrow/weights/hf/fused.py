"""Folders whose experts are fused, as transformers 5 holds them in memory and writes them when asked to
(`save_original_format=False`): `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F) for all experts of a layer.
"""

from collections.abc import Mapping

import torch

from raygrow.weights.hf.family import Family
from raygrow.weights.rules import Rule, Rules, Term, copy_rule

_GATE_UP = ".mlp.experts.gate_up_proj"


def unfusing_rules(shapes: Mapping[str, torch.Size], family: Family) -> Rules | None:
    """Rules that make what is usually stored from what is, where experts are fused; None where none are.

    Args:
        shapes: Name and shape of every tensor stored.
        family: Of the model.
    """
    if "mlp.router" not in family.modules or not any(name.endswith(_GATE_UP) for name in shapes):
        return None
    rules: dict[str, Rule] = {}
    for name, shape in shapes.items():
        layer, _, module = name.partition(".mlp.")
        if name.endswith(_GATE_UP):
            gate, up = torch.arange(shape[1]).chunk(2)
            rules |= _experts(name, shape[0], f"{layer}.{family.modules['mlp.experts.gate']}", tuple(gate.tolist()))
            rules |= _experts(name, shape[0], f"{layer}.{family.modules['mlp.experts.up']}", tuple(up.tolist()))
        elif module == "experts.down_proj":
            rules |= _experts(name, shape[0], f"{layer}.{family.modules['mlp.experts.down']}", None)
        elif module == "gate.weight":
            rules[f"{layer}.{family.modules['mlp.router']}.weight"] = copy_rule(name)
        else:
            rules[name] = copy_rule(name)
    return rules


def _experts(fused: str, n_experts: int, stored: str, rows: tuple[int, ...] | None) -> dict[str, Rule]:
    return {f"{stored.format(expert=i)}.weight": Rule((Term(fused, gather=(i, rows)),)) for i in range(n_experts)}
