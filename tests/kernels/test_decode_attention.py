"""The twin against attention in fp64, the Triton kernel against the twin.

Shapes: R rows, S slots, T tokens, N heads, K key-value heads, H head dim, L Blocks.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raygrow.kernels.decode_attention import decode_attention, decode_attention_torch


class Case(NamedTuple):
    """Arguments of `decode_attention`."""

    q_RNH: Tensor
    k_STKH: Tensor
    v_STKH: Tensor
    slots_R: Tensor
    lengths_R: Tensor


HEADS = [(4, 4, 16), (4, 2, 8), (6, 1, 80), (12, 4, 64)]
"""Heads, key-value heads, head dim."""
LENGTHS = [[1], [77], [1, 2, 63, 64, 65, 299, 300, 17], [256, 257, 300]]


def random_case(
    heads: int, kv_heads: int, dim: int, lengths: list[int], *, dtype: torch.dtype, blocks: int = 1, room: int = 0
) -> Case:
    """Slots in random order and with holes; everything beyond a row's length is NaN.

    With several Blocks, the cache is one of them, side by side with the others.
    """
    generator = torch.Generator().manual_seed(heads * dim + len(lengths))
    slots, tokens = len(lengths) + 2, max(*lengths, 300, room)
    slots_R = torch.randperm(slots, generator=generator)[: len(lengths)]
    cache = torch.full((2, slots, tokens, blocks, kv_heads, dim), torch.nan, dtype=dtype)
    for slot, length in zip(slots_R.tolist(), lengths, strict=True):
        values = torch.randn(2, length, blocks, kv_heads, dim, generator=generator, dtype=torch.float64)
        cache[:, slot, :length] = values.to(dtype)
    q_RNH = torch.randn(len(lengths), heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return Case(q_RNH, cache[0, :, :, -1], cache[1, :, :, -1], slots_R, torch.tensor(lengths, dtype=torch.int32))


def reference(case: Case) -> Tensor:
    """Attention written out, in fp64."""
    q_RNH, k_STKH, v_STKH, slots_R, lengths_R = case
    shared = q_RNH.shape[1] // k_STKH.shape[2]
    rows = []
    for q_NH, slot, length in zip(q_RNH.double(), slots_R.tolist(), lengths_R.tolist(), strict=True):
        k_TNH = k_STKH[slot, :length].double().repeat_interleave(shared, 1)
        v_TNH = v_STKH[slot, :length].double().repeat_interleave(shared, 1)
        weights_NT = (torch.einsum("nh,tnh->nt", q_NH, k_TNH) * q_NH.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("nt,tnh->nh", weights_NT, v_TNH))
    return torch.stack(rows)


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_twin_is_attention(
    heads: int, kv_heads: int, dim: int, lengths: list[int], dtype: torch.dtype, tolerance: float, blocks: int
) -> None:
    case = random_case(heads, kv_heads, dim, lengths, dtype=dtype, blocks=blocks)
    found_RNH = decode_attention(*case)
    assert found_RNH.shape == case.q_RNH.shape
    assert found_RNH.dtype == dtype
    assert relative_error(found_RNH, reference(case)) < tolerance


def test_a_row_of_the_twin_does_not_depend_on_the_rows_beside_it() -> None:
    case = random_case(4, 2, 16, [5, 300, 1, 64], dtype=torch.float32)
    together_RNH = decode_attention_torch(*case)
    for row in range(4):
        one = slice(row, row + 1)
        alone_1NH = decode_attention_torch(
            case.q_RNH[one], case.k_STKH, case.v_STKH, case.slots_R[one], case.lengths_R[one]
        )
        assert torch.equal(alone_1NH[0], together_RNH[row])


def test_no_rows_give_no_rows() -> None:
    case = random_case(4, 2, 16, [5], dtype=torch.float32)
    assert decode_attention(case.q_RNH[:0], case.k_STKH, case.v_STKH, case.slots_R[:0], case.lengths_R[:0]).shape == (
        0,
        4,
        16,
    )


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestKernel:
    """The Triton kernel."""

    pytestmark = gpu

    @pytest.mark.parametrize("lengths", [*LENGTHS, [5000, 4097, 1, 700]], ids=str)
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [*HEADS, (16, 16, 128), (32, 8, 128), (32, 1, 64)])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
    )
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_it_is_its_twin(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        lengths: list[int],
        dtype: torch.dtype,
        tolerance: float,
        blocks: int,
    ) -> None:
        case = random_case(heads, kv_heads, dim, lengths, dtype=dtype, blocks=blocks)
        found_RNH = decode_attention(*on_gpu(case))
        assert relative_error(found_RNH.cpu(), reference(case)) < tolerance

    def test_a_row_does_not_depend_on_the_rows_beside_it(self) -> None:
        case = on_gpu(random_case(16, 4, 64, [5, 3000, 1, 64], dtype=torch.bfloat16))
        together_RNH = decode_attention(*case)
        for row in range(4):
            one = slice(row, row + 1)
            alone_1NH = decode_attention(
                case.q_RNH[one], case.k_STKH, case.v_STKH, case.slots_R[one], case.lengths_R[one]
            )
            assert torch.equal(alone_1NH[0], together_RNH[row])

    def test_a_cuda_graph_is_replayed_for_other_slots_and_lengths(self) -> None:
        case = on_gpu(random_case(8, 2, 64, [900, 3, 257], dtype=torch.bfloat16))
        slots_R, lengths_R = case.slots_R.clone(), torch.ones_like(case.lengths_R)
        inputs = case._replace(slots_R=slots_R, lengths_R=lengths_R)
        decode_attention(*inputs)  # compiled before it is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_RNH = decode_attention(*inputs)
        order = torch.tensor([2, 0, 1], device="cuda")
        slots_R.copy_(case.slots_R[order])
        lengths_R.copy_(case.lengths_R[order])
        graph.replay()
        assert torch.equal(out_RNH, decode_attention(*inputs))
        assert not out_RNH.isnan().any()


def on_gpu(case: Case) -> Case:
    """The same arguments on the device, the cache's strides kept."""
    return Case(*(tensor.to("cuda") if tensor.dim() < 4 else whole_on_gpu(tensor) for tensor in case))


def whole_on_gpu(cache: Tensor) -> Tensor:
    base = cache._base
    assert base is not None
    return base.to("cuda").as_strided(cache.shape, cache.stride(), cache.storage_offset())
