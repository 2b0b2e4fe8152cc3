"""Attention of one new token per sequence over itself and all the tokens that its slot of a key-value cache holds.

`decode_attention` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: R rows (sequences), S slots, T tokens, N heads, K key-value heads, G = N / K heads that share one, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from raygrow.kernels.group_select import Groups, Listed, list_groups_torch
from raygrow.kernels.rotary import rotate


def decode_attention(
    q_RNH: Tensor,
    k_RKH: Tensor,
    v_RKH: Tensor,
    rope: tuple[Tensor, Tensor],
    k_STKH: Tensor,
    v_STKH: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
    then: Groups | None = None,
) -> tuple[Tensor, Listed | None]:
    """Turns each row's query and key to its position, stores key and value there, and attends to all up to there.

    A row's result does not depend on the rows beside it. Nothing beyond a row's position is read.

    Args:
        q_RNH: One query per sequence, not yet turned; a row's heads are contiguous, here and in what follows.
        k_RKH: Its key, not yet turned.
        v_RKH: Its value.
        rope: Cosines and sines of each row's position, `(R, H)` each.
        k_STKH: Keys of all slots. Slots and tokens may be any distance apart; a token's heads are contiguous.
        v_STKH: Values, with the same strides.
        slots_R: Which slot each row has, int64. Rows that share one, as those that fill up a CUDA graph, get nothing
            that makes sense.
        positions_R: How many tokens the slot holds before this one, int64. On CUDA nothing waits for it, and the
            launch depends on shapes only, so a CUDA graph can be replayed for other slots and positions.
        then: What is to be kept of the output: of one row, of heads in whole groups.

    Returns:
        `(R, N, H)`, and what is kept of it if that is asked for.
    """
    given = q_RNH, k_RKH, v_RKH, rope, k_STKH, v_STKH, slots_R, positions_R
    if q_RNH.is_cuda and q_RNH.dtype != torch.float64:
        from raygrow.kernels.triton_decode_attention import decode_attention_triton

        return decode_attention_triton(*given, then)
    out_RNH = decode_attention_torch(*given)
    return out_RNH, None if then is None else list_groups_torch(out_RNH.flatten(1), then)


def decode_attention_torch(
    q_RNH: Tensor,
    k_RKH: Tensor,
    v_RKH: Tensor,
    rope: tuple[Tensor, Tensor],
    k_STKH: Tensor,
    v_STKH: Tensor,
    slots_R: Tensor,
    positions_R: Tensor,
) -> Tensor:
    """The torch twin of the Triton kernel; same contract, except that it waits for slots and positions."""
    k_STKH[slots_R, positions_R] = rotate(k_RKH, *rope)
    v_STKH[slots_R, positions_R] = v_RKH
    # heads that share keys are queries of one head: no key is copied for them
    q_RKGH = rotate(q_RNH, *rope).unflatten(1, (k_STKH.shape[2], -1))
    out_RKGH = torch.empty_like(q_RKGH)
    for row, (slot, position) in enumerate(zip(slots_R.tolist(), positions_R.tolist(), strict=True)):
        k_KTH, v_KTH = (cache[slot, : position + 1].transpose(0, 1) for cache in (k_STKH, v_STKH))
        # with a batch of one, because the fast kernels want four dimensions
        out_RKGH[row] = F.scaled_dot_product_attention(q_RKGH[row, None], k_KTH[None], v_KTH[None])[0]
    return out_RKGH.flatten(1, 2)
