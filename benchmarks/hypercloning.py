"""Is our width growth the published HyperCloning? The same random Llama, grown by both, tensor by tensor.

    git clone https://github.com/apple/ml-hypercloning PEER
    python benchmarks/hypercloning.py PEER

Prints, for each shape of Llama with and without noise: how far both grown models are from the source's logits (fp64,
relative to the largest), and which of their tensors differ. Written for transformers of 2024, the peer reads two
attributes of attention modules that newer versions have dropped, and imports OLMo's package; both are put in its way.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers
from common import write_results
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from raygrow import Width, grow_model

SHAPES: dict[str, dict[str, Any]] = {
    "MHA, untied": {"num_key_value_heads": 8, "tie_word_embeddings": False},
    "GQA, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "MQA, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "GQA, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
NOISES = (None, 10.0)
FACTOR = 2


def main() -> None:
    """Grows every shape both ways and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path, help="a checkout of apple/ml-hypercloning")
    clone_model = import_peer(parser.parse_args().peer)
    rows = []
    print(f"{'model':<14}{'noise':>7}  {'peer off by':>12}{'ours off by':>12}  tensors that differ")
    for name, shape in SHAPES.items():
        for snr_db in NOISES:
            row = {"model": name, "snr_db": snr_db, **compare(shape, snr_db, clone_model)}
            rows.append(row)
            noise = "none" if snr_db is None else f"{snr_db:g} dB"
            print(f"{name:<14}{noise:>7}  {row['peer']:>12.1e}{row['ours']:>12.1e}  {row['differing'] or 'none'}")
    print(f"written to {write_results('hypercloning', {'factor': FACTOR, 'rows': rows})}")


def compare(shape: dict[str, Any], snr_db: float | None, clone_model: Any) -> dict[str, Any]:
    """One random Llama, both grown models' distance from it, and which of their tensors are not the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8, **shape
    )
    source = transformers.LlamaForCausalLM(config).double().eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = clone_model(source, FACTOR, FACTOR, snr_db=snr_db).double().eval()
    ours = grow_model(source, Width(factor=FACTOR, untie=shape["tie_word_embeddings"], noise_snr_db=snr_db or 0.0))
    tokens = torch.randint(199, (2, 32))
    want = source(tokens).logits
    tensors = dict(theirs.named_parameters())
    pairs = {name: (tensors[name], tensor) for name, tensor in ours.named_parameters()}
    return {
        "peer": distance(theirs(tokens).logits, want),
        "ours": distance(ours(tokens).logits, want),
        "differing": sorted(
            {kind(name) for name, (a, b) in pairs.items() if a.shape != b.shape or not torch.equal(a, b)}
        ),
    }


def distance(logits: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return ((logits - want).abs().max() / want.abs().max()).item()


def kind(name: str) -> str:
    """A tensor's name without its layer."""
    return name.split(".")[-2]


def import_peer(path: Path) -> Any:
    """The peer's `cloneModel`."""
    for name in ("hf_olmo", "hf_olmo.configuration_olmo", "hf_olmo.modeling_olmo"):
        stub: Any = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: type(attribute, (), {})
        sys.modules[name] = stub
    for name in ("num_heads", "num_key_value_heads"):
        key = name.replace("num_heads", "num_attention_heads")
        setattr(LlamaAttention, name, property(lambda module, key=key: getattr(module.config, key)))
    sys.path.insert(0, str(path))
    from hypercloning import cloneModel  # type: ignore

    return cloneModel


if __name__ == "__main__":
    main()
