"""Where the energy of a model's activations lies on a text: second moments, a Block at a time.

Only one Block's weights are on the device at any moment, beside the hidden states of the whole text.

Shapes: B sequences, T tokens, D model.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raygrow.nn.attention import default_attend
from raygrow.nn.block import Block
from raygrow.nn.config import ModelConfig
from raygrow.nn.rope import rope_angles
from raygrow.progress import Progress, silent
from raygrow.sparsity.inputs import Input

Moments = dict[Input, Tensor]
"""Of a Block's `attention` and `mlp`, the sum over tokens of x^T x, `(D, D)` in fp64 on the CPU, where x is normalised
but has no gains yet: what a rotated model, whose gains are in its weights, has in its own basis."""


@torch.no_grad()
def calibrate(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokens_BT: Tensor,
    *,
    device: torch.device,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Iterator[Moments]:
    """Moments of every Block, in order, from activations in fp32 at least.

    Args:
        config: The model, whose norms are RMS norms.
        tensors: Its parameters by name, perhaps read from a file as they are asked for.
        tokens_BT: The text, sequences as long as those that the model is used for.
        device: Where to compute.
        batch_size: Sequences at a time.
        progress: Told of every Block.
    """
    dtype = torch.promote_types(tensors["embedding.weight"].dtype, torch.float32)
    batches = tokens_BT.split(batch_size)
    embedding_VD = tensors["embedding.weight"]
    states = [embedding_VD[batch.to(embedding_VD.device)].to(device, dtype) for batch in batches]
    positions_T = torch.arange(tokens_BT.shape[1], device=device)
    rope = rope_angles(positions_T, head_dim=config.head_dim, theta=config.rope_theta)
    attend = default_attend(config)
    for index in range(config.n_blocks):
        block = load_block(config, tensors, index).to(device, dtype)
        moments: Moments = {}
        hooks = _watch(block, config, moments)
        states = [block(x_BTD, rope, attend)[0] for x_BTD in states]
        for hook in hooks:
            hook.remove()
        yield {name: moment.cpu() for name, moment in moments.items()}
        progress(index + 1, config.n_blocks, "blocks calibrated")


def load_block(config: ModelConfig, tensors: Mapping[str, Tensor], index: int) -> Block:
    """One Block of a model with its parameters, which may be views of a file."""
    with torch.device("meta"):
        block = Block(config, index)
    names = [name for name, _ in block.named_parameters()]
    block.load_state_dict({name: tensors[f"blocks.{index}.{name}"] for name in names}, assign=True)
    return block.requires_grad_(False)


def _watch(block: Block, config: ModelConfig, moments: Moments) -> list[RemovableHandle]:
    """Hooks that add what comes into a Block's norms to its moments."""

    def moment(name: Input):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_ND = F.rms_norm(inputs[0].flatten(0, -2), (config.d_model,), eps=config.norm_eps)
            # each batch in its own precision: only the sum over many needs more
            found_DD = (x_ND.T @ x_ND).double()
            moments[name] = moments[name] + found_DD if name in moments else found_DD

        return hook

    return [
        block.attention_norm.register_forward_pre_hook(moment("attention")),
        block.mlp_norm.register_forward_pre_hook(moment("mlp")),
    ]
