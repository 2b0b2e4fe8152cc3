"""The next token of every sequence, all at once, and how likely tokens were.

A token depends on its sequence's logits, seed and number alone: not on the sequences beside it, and not on how often
it was computed. Shapes: R rows (one per sequence), V vocabulary.
"""

from collections.abc import Sequence as Row

import torch
from torch import Tensor

from raygrow.infer.request import Logprob
from raygrow.infer.sampling import Sampling
from raygrow.infer.staging import to_device

NOT_A_NUMBER = -1
"""Stands for a token where the model gave no usable logits."""
SLAB = 256
"""Rows whose log-probabilities are computed at once: they are in fp32, over the whole vocabulary."""
TIES = 4
"""Alternatives looked at beyond those asked for: `topk` gives equals in any order, and the lowest id is to be first."""


def likeliest(logits_RV: Tensor) -> Tensor:
    """The token of each row that is chosen greedily: of equals, the lowest id.

    Returns:
        `(R,)` ids; NOT_A_NUMBER where the logits hold nan, or no finite number.
    """
    best_R, tokens_R = logits_RV.max(-1)
    # finite, and in fewer kernels than isfinite() takes; a number given to where() would be copied, and waited for
    return tokens_R.masked_fill(~(best_R.abs() < torch.inf), NOT_A_NUMBER)


def choose_tokens(
    logits_RV: Tensor, likeliest_R: Tensor, samplings: Row[Sampling], seeds: Row[int], numbers: Row[int]
) -> Tensor:
    """The next tokens. Nothing here waits for the device.

    Args:
        logits_RV: Of any float type.
        likeliest_R: Of them.
        samplings: What each row's request asks for.
        seeds: Of each row's sequence.
        numbers: How many tokens each row's sequence has been given before this one.

    Returns:
        `(R,)` ids; NOT_A_NUMBER where the logits hold nan, or no finite number.
    """
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not drawn:
        return likeliest_R
    uniforms = [uniform(seeds[row], numbers[row]) for row in drawn]
    given = [samplings[row] for row in drawn]
    if len(drawn) == len(samplings):
        tokens_R = _draw(logits_RV.float(), given, uniforms)
    else:
        rows_D = to_device(drawn, logits_RV.device)
        tokens_R = likeliest_R.index_copy(0, rows_D, _draw(logits_RV[rows_D].float(), given, uniforms))
    return torch.where(likeliest_R == NOT_A_NUMBER, likeliest_R, tokens_R)


def _draw(logits_RV: Tensor, samplings: Row[Sampling], uniforms: Row[float]) -> Tensor:
    device = logits_RV.device
    temperatures = [sampling.temperature for sampling in samplings]
    temperatures_R, uniforms_R = to_device([temperatures, uniforms], device, dtype=torch.float32)
    logits_RV = logits_RV / temperatures_R[:, None].clamp(1e-6, 1e6)  # beyond, fp32 would not hold what comes of it
    cut = [row for row, sampling in enumerate(samplings) if sampling.top_k or sampling.top_p < 1]
    if len(cut) == len(samplings):
        logits_RV = _keep_likely(logits_RV, samplings)
    elif cut:
        rows_C = to_device(cut, device)
        logits_RV[rows_C] = _keep_likely(logits_RV[rows_C], [samplings[row] for row in cut])
    # the inverse of the cumulative distribution at a uniform number, in the order of the ids
    cumulative_RV = logits_RV.softmax(-1).cumsum(-1)
    target_R1 = uniforms_R[:, None] * cumulative_RV[:, -1:]
    tokens_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    # a product that rounding made equal to the whole: the last token of any probability
    last_R = torch.searchsorted(cumulative_RV, cumulative_RV[:, -1:].contiguous())[:, 0]
    return torch.minimum(tokens_R, last_R)


def _keep_likely(logits_RV: Tensor, samplings: Row[Sampling]) -> Tensor:
    """Puts the tokens out of reach that are beyond top_k, then those beyond top_p of what is left."""
    device, size = logits_RV.device, logits_RV.shape[-1]
    top_k_R1 = to_device([[min(sampling.top_k or size, size)] for sampling in samplings], device)
    top_p_R1 = to_device([[sampling.top_p] for sampling in samplings], device, dtype=torch.float32)
    sorted_RV, ids_RV = logits_RV.sort(descending=True, stable=True)
    sorted_RV = sorted_RV.masked_fill(torch.arange(size, device=device) >= top_k_R1, -torch.inf)
    p_RV = sorted_RV.softmax(-1)
    # a token stays while those before it have not reached top_p: the likeliest one always does
    beyond_RV = (p_RV.cumsum(-1) - p_RV >= top_p_R1) & (top_p_R1 < 1)
    beyond_RV[:, 0] = False  # a tiny top_p is 0 in fp32
    sorted_RV = sorted_RV.masked_fill(beyond_RV, -torch.inf)
    return torch.empty_like(logits_RV).scatter_(-1, ids_RV, sorted_RV)


def uniform(seed: int, number: int) -> float:
    """The number-th draw of a seed, in [0, 1): 24 bits of a counter put through SplitMix64's mixer, twice."""
    bits = _mix(_mix(seed & _MASK) + number & _MASK)
    return (bits >> 40) / (1 << 24)  # as many bits as fp32 has


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def logprobs(logits_RV: Tensor, tokens: Row[int], counts: Row[int]) -> list[Logprob]:
    """How likely tokens were.

    Args:
        logits_RV: Of any float type; before temperature.
        tokens: The token of each row.
        counts: How many of the likeliest tokens to give beside each.

    Returns:
        One per row.
    """
    found: list[Logprob] = []
    for first in range(0, len(tokens), SLAB):
        rows = slice(first, first + SLAB)
        found += _logprobs(logits_RV[rows], tokens[rows], counts[rows])
    return found


def _logprobs(logits_RV: Tensor, tokens: Row[int], counts: Row[int]) -> list[Logprob]:
    logprobs_RV = logits_RV.float().log_softmax(-1)
    own_R = logprobs_RV.gather(-1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0].tolist()
    if not any(counts):
        return [Logprob(token, own, ()) for token, own in zip(tokens, own_R, strict=True)]
    top_RN, ids_RN = logprobs_RV.topk(min(max(counts) + TIES, logprobs_RV.shape[-1]))
    return [
        Logprob(token, own, tuple(sorted(zip(ids, top, strict=True), key=_likeliest)[:count]))
        for token, own, ids, top, count in zip(tokens, own_R, ids_RN.tolist(), top_RN.tolist(), counts, strict=True)
    ]


def _likeliest(pair: tuple[int, float]) -> tuple[float, int]:
    return -pair[1], pair[0]
