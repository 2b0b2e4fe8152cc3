"""A mixture of experts is what a loop over tokens says, in every mode that training runs it in.

Shapes: B batch, T tokens, N = B x T, D model, E experts, K experts of a token.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.loss import add_losses
from raygrow.nn.mlp import mlp
from raygrow.nn.moe import Moe, balance_loss
from raygrow.nn.rack import Rack

CONFIG = ModelConfig(
    vocab_size=61, d_model=32, n_heads=2, d_ff=48, blocks_per_stack=2, n_experts=8, top_k=2, max_seq_len=16
)
VARIANTS = {
    "gated": {},
    "shares of all": {"norm_topk_prob": False},
    "plain, biases": {"mlp": "gelu", "mlp_bias": True, "d_expert": 24},
    "gated, with zeros": {"mlp": "reglu", "mlp_bias": True},
    "squared": {"mlp": "relu2", "d_expert": 24},
    "one expert": {"top_k": 1, "norm_topk_prob": False, "mlp_bias": True},
    "all experts": {"n_experts": 3, "top_k": 3},
}


def random_moe(config: ModelConfig, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Moe:
    """Weights large enough for the experts and the router to matter."""
    generator = torch.Generator().manual_seed(0)
    moe = Moe(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return moe.to(device, dtype)


def random_x(config: ModelConfig, dtype: torch.dtype = torch.float64, device: str = "cpu", tokens: int = 7) -> Tensor:
    x_BTD = torch.randn(3, tokens, config.d_model, generator=torch.Generator().manual_seed(1))
    return x_BTD.to(device, dtype).requires_grad_()


def dense_mlp(config: ModelConfig) -> nn.Module:
    """An MLP of the size of one expert."""
    return mlp(replace(config, n_experts=0, top_k=0, d_expert=0, dense_blocks=(), d_ff=config.d_expert))


def by_token(moe: Moe, config: ModelConfig, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a mixture of experts and its balance loss, a token at a time."""
    one, rows, loss = dense_mlp(config), [], x_BTD.new_zeros(())

    def expert(e: int, x_D: Tensor) -> Tensor:
        return functional_call(one, {name: stacked[e] for name, stacked in moe.experts.named_parameters()}, x_D)

    for x_TD in x_BTD:
        load_E, p_TE = [0] * config.n_experts, (x_TD @ moe.router.weight.T).softmax(-1)
        for x_D, p_E in zip(x_TD, p_TE, strict=True):
            chosen = p_E.argsort(descending=True)[: config.top_k].tolist()
            scale = sum(p_E[e] for e in chosen) if config.norm_topk_prob else 1
            rows.append(sum(p_E[e] / scale * expert(e, x_D) for e in chosen))
            for e in chosen:
                load_E[e] += 1
        shares_E = [load / sum(load_E) for load in load_E]
        loss = loss + len(x_TD) * config.n_experts * sum(f * P for f, P in zip(shares_E, p_TE.mean(0), strict=True))
    return torch.stack(rows).view_as(x_BTD), loss


def gradients(out_BTD: Tensor, loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Output, balance loss, and the gradients of a random combination of both."""
    direction_BTD = torch.randn(out_BTD.shape, generator=torch.Generator().manual_seed(2)).to(out_BTD.device)
    total = (out_BTD * direction_BTD).sum() + 3 * loss
    return [out_BTD, loss, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_mixture_is_what_its_tokens_get_one_by_one(change: dict) -> None:
    config = replace(CONFIG, **change)
    moe, x_BTD = random_moe(config), random_x(config)
    inputs = [x_BTD, *moe.parameters()]
    out_BTD, balance, _ = moe(x_BTD)
    assert balance.load_BE.sum(1).tolist() == [7 * config.top_k] * 3
    found = gradients(out_BTD, balance.loss_B.sum(), inputs)
    for one, expected in zip(found, gradients(*by_token(moe, config, x_BTD), inputs), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [{}, {"mlp": "gelu", "mlp_bias": True}, {"n_experts": 6}])
def test_two_equal_experts_at_even_weights_are_the_dense_mlp_to_the_bit(change: dict) -> None:
    config = replace(CONFIG, **change)
    moe, dense = random_moe(config, torch.float32), dense_mlp(config)
    with torch.no_grad():
        moe.router.weight.zero_()
        for name, parameter in dense.named_parameters():
            parameter.copy_(moe.experts.get_parameter(name)[0])
            moe.experts.get_parameter(name)[:] = parameter
    # 24 rows of 48 hidden units fill whole vector registers: the CPU rounds the rest of a tensor differently
    x_BTD = random_x(config, torch.float32, tokens=8)
    assert torch.equal(moe(x_BTD)[0], dense(x_BTD))


def test_experts_without_tokens_get_gradients_of_zeros() -> None:
    moe = random_moe(CONFIG)
    with torch.no_grad():
        moe.router.weight[2:] = 0
        moe.router.weight[:2] = 1
    out_BTD, balance, _ = moe(random_x(CONFIG).abs())
    out_BTD.sum().backward()
    assert balance.load_BE.sum(0).tolist() == [21, 21, 0, 0, 0, 0, 0, 0]
    for name, parameter in moe.experts.named_parameters():
        assert parameter.grad[:2].any(), name
        assert not parameter.grad[2:].any(), name


def test_even_experts_cost_one_a_token_and_a_single_one_as_many_as_there_are() -> None:
    even_BTE = torch.full((1, 16, 8), 1 / 8)
    assert balance_loss(even_BTE, torch.full((1, 8), 4)).item() == pytest.approx(16)
    one_BTE = torch.eye(8)[:1].expand(1, 16, 8)
    assert balance_loss(one_BTE, 32 * torch.eye(8, dtype=torch.long)[:1]).item() == pytest.approx(16 * 8)


def rack(config: ModelConfig = CONFIG) -> Rack:
    model = Rack(config)
    init_weights(model, config, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight *= 50
    return model.double()


def test_losses_do_not_depend_on_how_sequences_fall_on_batches() -> None:
    model = rack()
    tokens_BT, targets_BT = torch.randint(0, 61, (2, 5, 16), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BT, targets_BT)
    # the first sequence once more, with nothing to predict: it fills up the last batch
    tokens_BT, targets_BT = torch.cat((tokens_BT, tokens_BT[:1])), torch.cat((targets_BT, 0 * targets_BT[:1] - 100))
    parts = add_losses([model(*part) for part in zip(tokens_BT.split(2), targets_BT.split(2), strict=True)])
    assert torch.equal(parts.load_LE, whole.load_LE)
    assert whole.load_LE.sum(1).tolist() == [2 * 5 * 16] * 2
    torch.testing.assert_close(parts.objective(0.01), whole.objective(0.01), rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.balance, whole.balance, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss.objective(0.01), list(model.parameters())) for loss in (parts, whole)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_objective_weighs_the_blocks_mean_balance() -> None:
    tokens_BT, targets_BT = torch.randint(0, 61, (2, 2, 16))
    loss = rack()(tokens_BT, targets_BT)
    assert (loss.objective(0.5) - loss.nats).item() == pytest.approx(0.5 * loss.balance.item() / 2)


@pytest.mark.parametrize("change", [{}, {"mlp": "gelu", "mlp_bias": True}])
def test_traced_and_checkpointed_blocks_give_the_same_gradients(change: dict) -> None:
    model = rack(replace(CONFIG, **change)).float()
    inputs = list(model.parameters())
    tokens_BT, targets_BT = torch.randint(0, 61, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    plain = torch.autograd.grad(model(tokens_BT, targets_BT).objective(0.1), inputs)
    for block in model.blocks:
        block.forward = torch.compile(checkpointed(block), fullgraph=True, dynamic=False, backend="aot_eager")
    traced = torch.autograd.grad(model(tokens_BT, targets_BT).objective(0.1), inputs)
    for (name, _), one, other in zip(model.named_parameters(), plain, traced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def checkpointed(block: nn.Module):
    forward = block.forward
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [{}, {"mlp": "gelu", "mlp_bias": True}, {"norm_topk_prob": False, "n_experts": 64}])
def test_bf16_on_a_gpu_is_the_double_on_a_cpu(change: dict, compiled: bool) -> None:
    config = replace(CONFIG, d_model=256, d_expert=512, **change)
    moe, x_BTD = random_moe(config, torch.bfloat16), random_x(config, torch.bfloat16, tokens=200)
    with torch.no_grad():  # logits that bf16 can hold, so that no rounding turns a choice
        moe.router.weight.copy_(torch.eye(*moe.router.weight.shape))
        x_BTD[..., : config.n_experts] = torch.rand(3, 200, config.n_experts).argsort(-1) / 8
    wide, wide_x_BTD = copy.deepcopy(moe).double(), x_BTD.detach().double().requires_grad_()
    moe, x_BTD = moe.cuda(), x_BTD.detach().cuda().requires_grad_()
    run = torch.compile(moe, fullgraph=True, dynamic=False) if compiled else moe
    found, expected = (
        gradients(out_BTD, balance.loss_B.sum(), inputs)
        for (out_BTD, balance, _), inputs in (
            (run(x_BTD), [x_BTD, *moe.parameters()]),
            (wide(wide_x_BTD), [wide_x_BTD, *wide.parameters()]),
        )
    )
    for one, other in zip(found, expected, strict=True):
        assert (one.double().cpu() - other).norm() <= 0.01 * other.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [{}, {"mlp": "gelu", "mlp_bias": True}])
def test_bf16_on_a_gpu_gives_the_same_bits_again(change: dict, compiled: bool) -> None:
    config = replace(CONFIG, d_model=256, d_expert=512, **change)
    moe, x_BTD = random_moe(config, torch.bfloat16).cuda(), random_x(config, torch.bfloat16, tokens=800)
    x_BTD = x_BTD.detach().cuda().requires_grad_()
    run = torch.compile(moe, fullgraph=True, dynamic=False) if compiled else moe
    inputs = [x_BTD, *moe.parameters()]

    def once() -> list[Tensor]:
        # what feeds the grouped products is made right before them, as in training
        out_BTD, balance, _ = run(x_BTD * 1.0)
        return gradients(out_BTD, balance.loss_B.sum(), inputs)

    first = once()
    for _ in range(20):
        for one, other in zip(once(), first, strict=True):
            assert torch.equal(one, other)
