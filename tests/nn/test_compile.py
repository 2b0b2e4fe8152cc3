"""On a GPU: compiled Blocks have the gradients of those that are not, and the same ones every time.

Compilers fuse what they find, so a Block as a whole is tried, in the sizes at which they do it in different ways.
"""

import pytest
import torch
from torch import Tensor

from raygrow.nn.attention import default_attend
from raygrow.nn.block import Block
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rope import rope_angles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = {
    "dense": {},
    "experts": {"n_experts": 4, "top_k": 2},
    "plain experts, biases": {"n_experts": 4, "top_k": 2, "mlp": "gelu", "mlp_bias": True},
    "zeros": {"mlp": "reglu"},
    "squared experts": {"n_experts": 4, "top_k": 2, "mlp": "relu2"},
    "layer norm": {"norm": "layernorm", "attention_bias": True},
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d_model", [256, 1536])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_compiled_block_has_the_gradients_of_the_block(kind: dict, d_model: int, deterministic: bool) -> None:
    config = ModelConfig(vocab_size=16, d_model=d_model, n_heads=4, d_ff=512, blocks_per_stack=1, **kind)
    block = Block(config, 0)
    init_weights(block, config, 0)
    block.to("cuda", torch.bfloat16)
    x_BTD, grad_BTD = (torch.randn(8, 256, d_model, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x_BTD.requires_grad_()
    rope = rope_angles(torch.arange(256, device="cuda"), head_dim=config.head_dim, theta=config.rope_theta)
    inputs = [x_BTD, *block.parameters()]
    compiled = torch.compile(block, fullgraph=True, dynamic=False)

    def gradients(run: torch.nn.Module) -> list[Tensor]:
        # both from elsewhere, as in training: memory that was just freed holds something else
        out_BTD, balance, activity = run(x_BTD * 1.0, rope, default_attend(config))
        loss = (out_BTD * grad_BTD).sum() + (0 if balance is None else balance.loss_B.sum())
        loss = loss + (0 if activity is None else 100 * activity.size.sum())
        return list(torch.autograd.grad(loss, inputs))

    expected = gradients(block)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, *others = (gradients(compiled) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    names = ["x", *(name for name, _ in block.named_parameters())]
    offs = {name: far(one, other) for name, one, other in zip(names, first, expected, strict=True)}
    # rounding sends a few tokens to other experts, and moves a norm's bias, where much cancels, by up to 0.3;
    # what is wrong is wrong by more than its size
    assert max(offs.values()) <= 0.5, offs
    if deterministic:
        again = [{n for n, a, b in zip(names, other, first, strict=True) if not torch.equal(a, b)} for other in others]
        assert again == [set()] * len(others)


def far(one: Tensor, other: Tensor) -> float:
    """How far apart two tensors are, relative to the second."""
    return ((one - other).float().norm() / other.float().norm()).item()
