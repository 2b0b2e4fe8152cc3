"""The matrix products of many experts at once, over rows that are sorted by expert.

`grouped_mm` picks torch's grouped kernel for bf16 on CUDA and its torch twin, a loop over the experts, elsewhere.
Shapes: S rows, E experts, D input, F output.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 8
"""Sizes that torch's kernel takes are multiples of this: its loads are of 16 bytes."""


def grouped_mm(x_SD: Tensor, weight_EFD: Tensor, offsets_E: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    """`x @ weight[e].T + bias[e]` for the rows of every expert e.

    Args:
        x_SD: Rows, those of expert 0 first.
        weight_EFD: The experts' matrices.
        offsets_E: Where the rows of each expert end, int32, on the device: nothing waits for it. The last is S.
        bias_EF: The experts' biases.

    Returns:
        `(S, F)`. An expert without rows gets a gradient of zeros.
    """
    if not _has_kernel(x_SD, weight_EFD):
        return grouped_mm_twin(x_SD, weight_EFD, offsets_E, bias_EF)
    out_SF = F.grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=offsets_E)
    if bias_EF is None:
        return out_SF
    # a product with the rows' one-hot experts, not a gather: its gradient is a sum without atomic additions
    rows_S1 = torch.arange(len(x_SD), device=x_SD.device)[:, None]
    starts_E = F.pad(offsets_E[:-1], (1, 0))
    one_hot_SE = ((rows_S1 >= starts_E) & (rows_S1 < offsets_E)).to(x_SD.dtype)
    return out_SF + one_hot_SE @ bias_EF


def _has_kernel(x_SD: Tensor, weight_EFD: Tensor) -> bool:
    aligned = all(size % ALIGNMENT == 0 for size in weight_EFD.shape[1:])
    return x_SD.is_cuda and x_SD.dtype == weight_EFD.dtype == torch.bfloat16 and aligned


# an operator of its own, so that torch.compile need not look into the loop, whose slices depend on the data
@torch.library.custom_op("raygrow::grouped_mm_twin", mutates_args=())
def grouped_mm_twin(x_SD: Tensor, weight_EFD: Tensor, offsets_E: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    """The torch twin of `grouped_mm`; same contract, except that it waits for the offsets."""
    if x_SD.is_cuda:
        _warn_once(x_SD.dtype, tuple(weight_EFD.shape[1:]))
    parts = [
        F.linear(x_SD[rows], weight_EFD[e], None if bias_EF is None else bias_EF[e])
        for e, rows in enumerate(_slices(offsets_E))
        if rows.start < rows.stop  # of few tokens, as in generation, most experts have none
    ]
    return torch.cat(parts) if parts else x_SD.new_empty(0, weight_EFD.shape[1])


@grouped_mm_twin.register_fake
def _(x_SD: Tensor, weight_EFD: Tensor, offsets_E: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    return x_SD.new_empty(len(x_SD), weight_EFD.shape[1])


@torch.library.custom_op("raygrow::grouped_mm_twin_backward", mutates_args=())
def _twin_backward(
    grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the matrices and the biases."""
    groups = [(grad_SF[rows], x_SD[rows]) for rows in _slices(offsets_E)]
    return (
        torch.cat([grad @ weight for (grad, _), weight in zip(groups, weight_EFD, strict=True)]),
        torch.stack([grad.T @ x for grad, x in groups]),
        torch.stack([grad.sum(0) for grad, _ in groups]),
    )


@_twin_backward.register_fake
def _(grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_SD), torch.empty_like(weight_EFD), grad_SF.new_empty(weight_EFD.shape[:2])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    *saved, bias_EF = inputs
    ctx.save_for_backward(*saved)
    ctx.has_bias = bias_EF is not None


def _backward(ctx, grad_SF: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
    grad_x_SD, grad_weight_EFD, grad_bias_EF = _twin_backward(grad_SF, *ctx.saved_tensors)
    return grad_x_SD, grad_weight_EFD, None, grad_bias_EF if ctx.has_bias else None


grouped_mm_twin.register_autograd(_backward, setup_context=_save)


def _slices(offsets_E: Tensor) -> list[slice]:
    ends = offsets_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@cache
def _warn_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logger.warning(
        "grouped products on CUDA are fast in bf16 with sizes that are multiples of %d: these, %s of %d x %d, "
        "run one expert after another",
        ALIGNMENT,
        str(dtype).removeprefix("torch."),
        *shape,
    )
