"""Attention of one new token per sequence over all the tokens that its slot of a key-value cache holds.

`decode_attention` picks the Triton kernel on CUDA and its torch twin elsewhere.
Shapes: R rows (sequences), S slots, T tokens, N heads, K key-value heads, G = N / K heads that share one, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(q_RNH: Tensor, k_STKH: Tensor, v_STKH: Tensor, slots_R: Tensor, lengths_R: Tensor) -> Tensor:
    """Scaled dot-product attention of each row's query over the first tokens of its slot.

    A row's result does not depend on the rows beside it. Nothing beyond a row's length is read.

    Args:
        q_RNH: One query per sequence, contiguous.
        k_STKH: Keys of all slots. Slots and tokens may be any distance apart; a token's heads are contiguous.
        v_STKH: Values, with the same strides.
        slots_R: Which slot each row reads, int64.
        lengths_R: How many of its tokens, at least 1, int32 or int64. On CUDA nothing waits for it, and the launch
            depends on shapes only, so a CUDA graph can be replayed for other slots and lengths.

    Returns:
        `(R, N, H)`.
    """
    if q_RNH.is_cuda and q_RNH.dtype != torch.float64:
        from raygrow.kernels.triton_decode_attention import decode_attention_triton

        return decode_attention_triton(q_RNH, k_STKH, v_STKH, slots_R, lengths_R)
    return decode_attention_torch(q_RNH, k_STKH, v_STKH, slots_R, lengths_R)


def decode_attention_torch(q_RNH: Tensor, k_STKH: Tensor, v_STKH: Tensor, slots_R: Tensor, lengths_R: Tensor) -> Tensor:
    """The torch twin of the Triton kernel; same contract, except that it waits for slots and lengths."""
    # heads that share keys are queries of one head: no key is copied for them
    q_RKGH = q_RNH.unflatten(1, (k_STKH.shape[2], -1))
    out_RKGH = torch.empty_like(q_RKGH)
    for row, (slot, length) in enumerate(zip(slots_R.tolist(), lengths_R.tolist(), strict=True)):
        k_KTH, v_KTH = k_STKH[slot, :length].transpose(0, 1), v_STKH[slot, :length].transpose(0, 1)
        # with a batch of one, because the fast kernels want four dimensions
        out_RKGH[row] = F.scaled_dot_product_attention(q_RKGH[row, None], k_KTH[None], v_KTH[None])[0]
    return out_RKGH.flatten(1, 2)
