"""The twin against attention in fp64, the Triton kernel against the same.

Shapes: R rows, S slots, T tokens, N heads, K key-value heads, H head dim, L Blocks.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from raygrow.kernels.decode_attention import decode_attention, decode_attention_torch
from raygrow.kernels.group_select import list_groups_torch
from raygrow.kernels.rotary import rotate
from tests.kernels.test_group_select import same, some_groups


class Case(NamedTuple):
    """Arguments of `decode_attention`."""

    q_RNH: Tensor
    k_RKH: Tensor
    v_RKH: Tensor
    rope: tuple[Tensor, Tensor]
    k_STKH: Tensor
    v_STKH: Tensor
    slots_R: Tensor
    positions_R: Tensor

    def row(self, row: int) -> "Case":
        """One row alone, over the same cache."""
        one = slice(row, row + 1)
        new = self.q_RNH[one], self.k_RKH[one], self.v_RKH[one], (self.rope[0][one], self.rope[1][one])
        return Case(*new, self.k_STKH, self.v_STKH, self.slots_R[one], self.positions_R[one])


HEADS = [(4, 4, 16), (4, 2, 8), (6, 1, 80), (12, 4, 64)]
"""Heads, key-value heads, head dim."""
LENGTHS = [[1], [77], [1, 2, 63, 64, 65, 299, 300, 17], [256, 257, 300]]


def random_case(
    heads: int, kv_heads: int, dim: int, lengths: list[int], *, dtype: torch.dtype, blocks: int = 1, room: int = 0
) -> Case:
    """Slots in random order and with holes; everything from a row's position on is NaN.

    With several Blocks, the cache is one of them, side by side with the others. Queries, keys and values come side by
    side too, as one projection gives them.
    """
    generator = torch.Generator().manual_seed(heads * dim + len(lengths))

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    rows, slots, tokens = len(lengths), len(lengths) + 2, max(*lengths, 300, room)
    slots_R = torch.randperm(slots, generator=generator)[:rows]
    cache = torch.full((2, slots, tokens, blocks, kv_heads, dim), torch.nan, dtype=dtype)
    for slot, length in zip(slots_R.tolist(), lengths, strict=True):
        cache[:, slot, : length - 1] = random(2, length - 1, blocks, kv_heads, dim)
    qkv = random(rows, heads + 2 * kv_heads, dim)
    angles = 6 * torch.rand(rows, dim // 2, generator=generator).repeat(1, 2)
    return Case(
        *qkv.split([heads, kv_heads, kv_heads], 1),
        (angles.cos(), angles.sin()),
        cache[0, :, :, -1],
        cache[1, :, :, -1],
        slots_R,
        torch.tensor(lengths) - 1,
    )


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Attention written out, in fp64; and the new tokens' keys and values."""
    shared = case.q_RNH.shape[1] // case.k_RKH.shape[1]
    q_RNH, k_RKH = rotate(case.q_RNH, *case.rope).double(), rotate(case.k_RKH, *case.rope).double()
    rows = []
    for row, (slot, past) in enumerate(zip(case.slots_R.tolist(), case.positions_R.tolist(), strict=True)):
        k_TKH = torch.cat([case.k_STKH[slot, :past].double(), k_RKH[row, None]])
        v_TKH = torch.cat([case.v_STKH[slot, :past].double(), case.v_RKH[row, None].double()])
        k_TNH, v_TNH = (x.repeat_interleave(shared, 1) for x in (k_TKH, v_TKH))
        weights_NT = (torch.einsum("nh,tnh->nt", q_RNH[row], k_TNH) * k_RKH.shape[-1] ** -0.5).softmax(-1)
        rows.append(torch.einsum("nt,tnh->nh", weights_NT, v_TNH))
    return torch.stack(rows), k_RKH, case.v_RKH


def check(found_RNH: Tensor, case: Case, expected: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    """The result is right, the new tokens are stored, and nothing else has changed."""
    true_RNH, k_RKH, v_RKH = expected
    assert found_RNH.shape == case.q_RNH.shape
    assert found_RNH.dtype == case.q_RNH.dtype
    assert relative_error(found_RNH.cpu(), true_RNH) < tolerance
    where = case.slots_R, case.positions_R
    assert relative_error(case.k_STKH[where].cpu(), k_RKH) < tolerance
    assert torch.equal(case.v_STKH[where].cpu(), v_RKH)
    for cache in (case.k_STKH, case.v_STKH):
        for slot in range(len(cache)):
            known = dict(zip(case.slots_R.tolist(), case.positions_R.tolist(), strict=True)).get(slot, -1) + 1
            assert not cache[slot, :known].isnan().any()
            assert cache[slot, known:].isnan().all()


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
    expected = reference(case)
    check(decode_attention(*case)[0], case, expected, tolerance)


def test_a_row_of_the_twin_does_not_depend_on_the_rows_beside_it() -> None:
    case = random_case(4, 2, 16, [5, 300, 1, 64], dtype=torch.float32)
    together_RNH = decode_attention_torch(*case)
    for row in range(4):
        assert torch.equal(decode_attention_torch(*case.row(row))[0], together_RNH[row])


def check_listing(heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype, device: str) -> None:
    """A row alone is listed as it comes out, and comes out as if it were not."""
    case, again = (random_case(heads, kv_heads, dim, [length], dtype=dtype, room=3000) for _ in range(2))
    if device == "cuda":
        case, again = on_gpu(case), on_gpu(again)
    groups = some_groups(heads * dim, device)
    out_RNH, listed = decode_attention(*case, groups)
    assert torch.equal(out_RNH, decode_attention(*again)[0])
    assert listed is not None
    same(listed, list_groups_torch(out_RNH.flatten(1), groups))


def test_the_twin_lists_what_is_kept() -> None:
    check_listing(4, 2, 64, 70, torch.float64, "cpu")


def test_no_rows_give_no_rows() -> None:
    case = random_case(4, 2, 16, [5], dtype=torch.float32)
    none = slice(0)
    new = case.q_RNH[none], case.k_RKH[none], case.v_RKH[none], (case.rope[0][none], case.rope[1][none])
    cache = case.k_STKH, case.v_STKH
    assert decode_attention(*new, *cache, case.slots_R[none], case.positions_R[none])[0].shape == (0, 4, 16)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestKernel:
    """The Triton kernel."""

    pytestmark = gpu

    @pytest.mark.parametrize("lengths", [*LENGTHS, [5000, 4097, 1, 700]], ids=str)
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [*HEADS, (16, 16, 128), (32, 8, 128), (32, 1, 64)])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
    )
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_it_is_attention(
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
        expected, case = reference(case), on_gpu(case)
        for _ in range(2):  # the second time with tickets that the first has given back
            check(decode_attention(*case)[0], case, expected, tolerance)

    @pytest.mark.parametrize("length", [1, 60, 300, 3000])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (12, 4, 64), (6, 1, 96), (32, 8, 128)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_it_lists_what_is_kept(self, heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype) -> None:
        check_listing(heads, kv_heads, dim, length, dtype, "cuda")

    def test_keys_and_values_may_lie_apart(self) -> None:
        """As where keys have a norm of their own, and values are a part of one projection."""
        case = random_case(16, 4, 64, [5, 300, 1, 64], dtype=torch.bfloat16)
        expected, case = reference(case), on_gpu(case)
        case = case._replace(k_RKH=case.k_RKH.contiguous())
        assert case.k_RKH.stride() != case.v_RKH.stride()
        check(decode_attention(*case)[0], case, expected, 1e-2)

    def test_many_parts(self) -> None:
        case = random_case(1, 1, 16, [9000], dtype=torch.bfloat16)
        expected, case = reference(case), on_gpu(case)
        check(decode_attention(*case)[0], case, expected, 1e-2)

    def test_a_row_does_not_depend_on_what_those_beside_it_hold(self) -> None:
        def fresh() -> Case:  # each stores into its cache
            return on_gpu(random_case(16, 4, 64, [5, 3000, 1, 64], dtype=torch.bfloat16))

        together_RNH, _ = decode_attention(*fresh())
        for row in range(4):
            case = fresh()
            others_empty_R = torch.zeros_like(case.positions_R)
            others_empty_R[row] = case.positions_R[row]
            assert torch.equal(decode_attention(*case._replace(positions_R=others_empty_R))[0][row], together_RNH[row])
            assert relative_error(decode_attention(*case.row(row))[0][0], together_RNH[row]) < 1e-2

    def test_a_cuda_graph_is_replayed_for_other_slots_and_positions(self) -> None:
        case = on_gpu(random_case(8, 2, 64, [900, 3, 257], dtype=torch.bfloat16))
        slots_R, positions_R = case.slots_R.clone(), torch.zeros_like(case.positions_R)
        inputs = case._replace(slots_R=torch.full_like(slots_R, 4), positions_R=positions_R)
        slots_R = inputs.slots_R
        decode_attention(*inputs)  # compiled before it is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_RNH, _ = decode_attention(*inputs)
        order = torch.tensor([2, 0, 1], device="cuda")
        slots_R.copy_(case.slots_R[order])
        positions_R.copy_(case.positions_R[order])
        graph.replay()
        found_RNH = out_RNH.clone()
        assert torch.equal(found_RNH, decode_attention(*inputs)[0])
        assert not found_RNH.isnan().any()


def on_gpu(case: Case) -> Case:
    """The same arguments on the device, strides kept."""
    cos_RH, sin_RH = case.rope
    return Case(*(whole_on_gpu(x) for x in case[:3]), (cos_RH.cuda(), sin_RH.cuda()), *map(whole_on_gpu, case[4:]))


def whole_on_gpu(x: Tensor) -> Tensor:
    whole = x if x._base is None else x._base
    return whole.to("cuda").as_strided(x.shape, x.stride(), x.storage_offset())
