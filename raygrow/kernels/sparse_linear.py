"""Linear projections that read only the weights of the entries which a row of activations keeps.

A row keeps its `keep` largest entries (`select`), and a projection of it reads their rows of an input-major weight and
no others (`sparse_linear`). Rows that decode together, or keep what exceeds a threshold, come with zeros in place of
the rest (`masked_linear`). The others pick their Triton kernels on CUDA and their torch twins elsewhere; on a CPU the
twins skip memory too.

Shapes: R rows (tokens), D input, K entries kept, N entries of all rows that are not zero, F output, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 8
"""On a CPU; of more, next to nothing is left to skip, and the dense product is faster."""
NARROWEST_STRIP = 256
"""Columns that are worth a thread of a CPU."""


class Selection(NamedTuple):
    """The entries that rows keep, the same number of each."""

    index_RK: Tensor
    """Where they are, ascending, int32."""
    value_RK: Tensor
    """What they are."""


def select(x_RD: Tensor, keep: int, scale: Tensor | None = None) -> Selection:
    """The `keep` largest entries of each row, by `|x|` or `|x| * scale`; of equal ones, those that come first.

    Args:
        x_RD: Rows, contiguous.
        keep: How many entries, 1 to D. Nothing waits for the device, and all shapes follow from it.
        scale: How much the entries weigh, `(D,)`, or `(R, D)` where each row has its own; in fp32 at least, not
            negative.
    """
    if _on_triton(x_RD):
        from raygrow.kernels.triton_select import select_triton

        if scale is not None and scale.dim() == 2:
            # the kernel has one scale for all rows: it gets scores, whose entries are then looked up
            index_RK, _ = select_triton(x_RD.float() * scale, keep)
            return Selection(index_RK, x_RD.gather(1, index_RK.long()))
        return Selection(*select_triton(x_RD, keep, scale_D=scale))
    return select_torch(x_RD, keep, scale)


def norm_select(
    x_RD: Tensor, keep: int, eps: float, gain_D: Tensor | None = None, scale_D: Tensor | None = None
) -> Selection:
    """`select` of the rows' RMS norm, in one kernel."""
    if _on_triton(x_RD):
        from raygrow.kernels.triton_select import select_triton

        return Selection(*select_triton(x_RD, keep, eps=eps, gain_D=gain_D, scale_D=scale_D))
    return select_torch(F.rms_norm(x_RD, x_RD.shape[1:], gain_D, eps), keep, scale_D)


def masked(x_RD: Tensor, keep: int, scale: Tensor | None = None) -> Tensor:
    """The rows with zeros in place of what `select` drops."""
    if _on_triton(x_RD) and (scale is None or scale.dim() == 1):
        from raygrow.kernels.triton_select import masked_triton

        return masked_triton(x_RD, keep, scale_D=scale)
    return scatter(select(x_RD, keep, scale), x_RD.shape[1])


def norm_masked(
    x_RD: Tensor, keep: int, eps: float, gain_D: Tensor | None = None, scale_D: Tensor | None = None
) -> Tensor:
    """`masked` of the rows' RMS norm, in one kernel."""
    if _on_triton(x_RD):
        from raygrow.kernels.triton_select import masked_triton

        return masked_triton(x_RD, keep, eps=eps, gain_D=gain_D, scale_D=scale_D)
    return masked(F.rms_norm(x_RD, x_RD.shape[1:], gain_D, eps), keep, scale_D)


def above(x_RD: Tensor, threshold: float, scale: Tensor | None = None) -> Tensor:
    """The rows with zeros in place of entries whose `|x|`, or `|x| * scale`, does not exceed a threshold (TEAL,
    arXiv 2408.14690). What is not a number stays, so that it shows.

    Args:
        x_RD: Rows, contiguous.
        threshold: Of all entries.
        scale: As of `select`.
    """
    if _on_triton(x_RD):
        from raygrow.kernels.triton_select import above_triton

        return above_triton(x_RD, threshold, scale)
    return above_torch(x_RD, threshold, scale)


def norm_above(
    x_RD: Tensor, threshold: float, eps: float, gain_D: Tensor | None = None, scale_D: Tensor | None = None
) -> Tensor:
    """`above` of the rows' RMS norm, in one kernel."""
    if _on_triton(x_RD):
        from raygrow.kernels.triton_select import above_triton

        return above_triton(x_RD, threshold, scale_D, eps=eps, gain_D=gain_D)
    return above_torch(F.rms_norm(x_RD, x_RD.shape[1:], gain_D, eps), threshold, scale_D)


def above_torch(x_RD: Tensor, threshold: float, scale: Tensor | None = None) -> Tensor:
    """The torch twin of `above`."""
    score_RD = scored(x_RD, scale)
    # of bf16 torch would round the threshold before it compares
    wide_RD = score_RD.to(torch.promote_types(score_RD.dtype, torch.float32))
    return torch.where(wide_RD <= threshold, 0, x_RD)


def scored(x_RD: Tensor, scale: Tensor | None) -> Tensor:
    """What entries are chosen by: their size, weighted by a `scale` as of `select` where there is one."""
    return x_RD.abs() if scale is None else x_RD.abs() * scale


def sparse_linear(
    selection: Selection,
    weight_DF: Tensor,
    bias_F: Tensor | None = None,
    *,
    addend_RF: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x @ weight` of rows of which only the selected entries count; no other row of the weight is read.

    Every row of activations reads its own rows of the weight: made for one row, or few.

    Args:
        selection: Of every row.
        weight_DF: Input-major, contiguous.
        bias_F: Added.
        addend_RF: Added too, such as the residual stream.
        gated: Whether the weight's halves are a gate and what it is applied to: `silu(first) * second` is returned.
            Not together with a bias.

    Returns:
        `(R, F)`, or `(R, F / 2)` if gated, in the weight's dtype. Sums are in fp32 at least.
    """
    if _on_triton(weight_DF):
        from raygrow.kernels.triton_sparse_linear import sparse_linear_triton

        return sparse_linear_triton(*selection, weight_DF, bias_F=bias_F, addend_RF=addend_RF, gated=gated)
    return finished(sparse_linear_torch(*selection, weight_DF), bias_F, addend_RF, gated)


def sparse_expert_linear(
    selection: Selection, weight_EDF: Tensor, expert_R: Tensor, bias_EF: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """`sparse_linear` of rows that each have their expert's weight and bias.

    Args:
        selection: Of every row: a token that goes to several experts is several rows.
        weight_EDF: Input-major matrices of all experts, contiguous.
        expert_R: Whose weight each row takes, integers.
        bias_EF: Added; not together with `gated`.
        gated: As of `sparse_linear`.
    """
    if _on_triton(weight_EDF):
        from raygrow.kernels.triton_sparse_linear import sparse_linear_triton

        out_RF = sparse_linear_triton(*selection, weight_EDF, expert_R=expert_R, gated=gated)
        return out_RF if bias_EF is None else out_RF + bias_EF[expert_R]
    # the experts' rows are one long list of rows
    index_RK = selection.index_RK + expert_R[:, None].to(torch.int32) * weight_EDF.shape[1]
    out_RF = sparse_linear_torch(index_RK, selection.value_RK, weight_EDF.flatten(0, 1))
    return finished(out_RF, None if bias_EF is None else bias_EF[expert_R], None, gated)


def masked_linear(
    x_RD: Tensor,
    weight_DF: Tensor,
    bias_F: Tensor | None = None,
    *,
    addend_RF: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`x @ weight` of rows of which many entries are zero.

    On a CPU few rows read what each needs, where all of them together read less than the whole weight. On a GPU all of
    it is read: from two rows on that is faster than looking for what none of them needs, whatever they drop.

    Args:
        x_RD: Rows with zeros in place of what they drop (`masked`, `above`), contiguous.
        weight_DF: Input-major, contiguous.
        bias_F: Added.
        addend_RF: Added too.
        gated: As of `sparse_linear`.
    """
    product = masked_linear_torch if weight_DF.is_cpu and len(x_RD) <= FEW_ROWS else torch.matmul
    return finished(product(x_RD, weight_DF), bias_F, addend_RF, gated)


def scatter(selection: Selection, size: int) -> Tensor:
    """Selected entries in their places among zeros, `(R, size)`."""
    index_RK, value_RK = selection
    return value_RK.new_zeros(len(value_RK), size).scatter(1, index_RK.long(), value_RK)


def select_torch(x_RD: Tensor, keep: int, scale: Tensor | None = None) -> Selection:
    """The torch twin of `select`."""
    score_RD = x_RD if scale is None else x_RD * scale.to(torch.promote_types(x_RD.dtype, torch.float))
    if score_RD.dtype == torch.float64:
        index_RK = score_RD.abs().sort(descending=True, stable=True).indices[:, :keep].sort().values
    else:
        # without their sign, the bits of numbers sort as their sizes do. Below them a place, the first highest: no two
        # keys are equal, so a threshold leaves exactly as many as are wanted, ten times faster than sorting
        size = x_RD.shape[1]
        bits_RD = score_RD.float().view(torch.int32).long() & 0x7FFFFFFF
        key_RD = (bits_RD << 32) | torch.arange(size - 1, -1, -1, device=x_RD.device)
        smallest_R1 = key_RD.kthvalue(size - keep + 1, keepdim=True).values
        index_RK = (key_RD >= smallest_R1).nonzero()[:, 1].view(-1, keep)
    return Selection(index_RK.to(torch.int32), x_RD.gather(1, index_RK))


def sparse_linear_torch(index_RK: Tensor, value_RK: Tensor, weight_DF: Tensor) -> Tensor:
    """The torch twin of `sparse_linear`, without what may follow the product.

    A sum of weighted rows is a bag of embeddings, and torch's kernel for these reads just the rows of the bag, with
    sums in fp32.
    """
    rows, keep = index_RK.shape
    starts_R = torch.arange(0, rows * keep, keep, dtype=torch.int32, device=index_RK.device)
    return _bags(index_RK.flatten(), value_RK.flatten(), starts_R, weight_DF)


def masked_linear_torch(x_RD: Tensor, weight_DF: Tensor) -> Tensor:
    """The torch twin of `masked_linear` for few rows, without what may follow the product."""
    row_N, index_N = x_RD.nonzero(as_tuple=True)
    if not 0 < len(index_N) < len(weight_DF):  # each row reads its own part: of more, the whole is read sooner
        return x_RD @ weight_DF
    starts_R = torch.searchsorted(row_N, torch.arange(len(x_RD)), out_int32=True)
    return _bags(index_N.to(torch.int32), x_RD[row_N, index_N], starts_R, weight_DF)


def masked_expert_linear_torch(x_RD: Tensor, weight_EDF: Tensor, expert_R: Tensor) -> Tensor:
    """Rows of which many entries are zero, each with its expert's weight: only what is not zero is read."""
    row_N, index_N = x_RD.nonzero(as_tuple=True)
    if not len(index_N):
        return weight_EDF.new_zeros(len(x_RD), weight_EDF.shape[2])
    # the experts' rows are one long list of rows
    of_expert_N = index_N + expert_R.long()[row_N] * weight_EDF.shape[1]
    starts_R = torch.searchsorted(row_N, torch.arange(len(x_RD), device=row_N.device), out_int32=True)
    return _bags(of_expert_N.to(torch.int32), x_RD[row_N, index_N], starts_R, weight_EDF.flatten(0, 1))


def _bags(index_N: Tensor, value_N: Tensor, starts_R: Tensor, weight_DF: Tensor) -> Tensor:
    """Sums of weighted rows of a weight, one from each start up to the next, `(R, F)`.

    Torch's threads share bags: so that they have work for one row, the weight is cut into strips of columns, each with
    bags of its own. How it is cut changes no sum.
    """
    rows, features = len(starts_R), weight_DF.shape[1]
    strips = _strips(rows, features)
    columns = features // strips
    strip_S1 = torch.arange(strips, dtype=torch.int32, device=index_N.device)[:, None]
    out = F.embedding_bag(
        (index_N * strips + strip_S1).flatten(),
        weight_DF.view(-1, columns),
        (starts_R + strip_S1 * len(index_N)).flatten(),
        mode="sum",
        per_sample_weights=value_N.repeat(strips),
    )
    return out.view(strips, rows, columns).transpose(0, 1).flatten(1)


def _strips(rows: int, columns: int) -> int:
    strips = torch.get_num_threads() if rows < torch.get_num_threads() else 1
    return strips if columns % strips == 0 and columns // strips >= NARROWEST_STRIP else 1


def finished(out_RF: Tensor, bias_F: Tensor | None, addend_RF: Tensor | None, gated: bool) -> Tensor:
    """A product, plus a bias, gated, plus what is to be added; each where there is one."""
    if bias_F is not None:
        out_RF = out_RF + bias_F
    if gated:
        gate_RF, up_RF = out_RF.chunk(2, dim=1)
        out_RF = F.silu(gate_RF) * up_RF
    return out_RF if addend_RF is None else out_RF + addend_RF


def _on_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64
