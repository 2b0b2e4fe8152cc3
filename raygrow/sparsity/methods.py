"""Which entries of an input are kept.

| method         | scores of a token's entries    | kept                       | basis         | of               |
|----------------|--------------------------------|----------------------------|---------------|------------------|
| `topk`         | magnitude                      | as many of every token     | the model's   |                  |
| `larosa`       | magnitude                      | as many of every token     | each Block's  | arXiv 2507.01299 |
| `wina`         | magnitude x norm of the column | as many of every token     | the model's   | arXiv 2505.19427 |
| `teal`         | magnitude                      | what exceeds a threshold   | the model's   | arXiv 2408.14690 |
| `rotated_wina` | magnitude x norm of the column | as many of every token     | one for all   |                  |
| `rotated_teal` | magnitude x norm of the column | what exceeds a threshold   | one for all   |                  |
| `grouped`      | magnitude x norm of the column | as many of each group      | one for all   |                  |
| `relu`         | magnitude, of hidden units     | what is not zero           | the model's   |                  |

A column is what an entry is multiplied by, in all projections that read the input together. A group is 32 neighbouring
entries; how many it keeps is its own, and the same of every token. The basis is what a method has unless another is
asked for.
Shapes: R rows (tokens), D entries, G groups, F outputs.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from raygrow.kernels.group_select import Groups, group_kept, groups_of
from raygrow.kernels.sparse_linear import above, masked, scored
from raygrow.sparsity.scores import Histogram, RankedEnergy

Method = Literal["larosa", "topk", "wina", "teal", "rotated_wina", "rotated_teal", "grouped", "relu"]
METHODS: tuple[Method, ...] = get_args(Method)
WEIGHTED: tuple[Method, ...] = ("wina", "rotated_wina", "rotated_teal", "grouped")
"""Their scores are weighted by the norms of columns."""
THRESHOLDED: tuple[Method, ...] = ("teal", "rotated_teal")
"""They keep what scores above a calibrated threshold."""
Rotation = Literal["none", "global", "block"]
ROTATIONS: dict[Method, Rotation] = {
    "larosa": "block",
    "topk": "none",
    "wina": "none",
    "teal": "none",
    "rotated_wina": "global",
    "rotated_teal": "global",
    "grouped": "global",
    "relu": "none",
}
"""The basis of each method."""


@dataclass(frozen=True)
class Choice:
    """How much of an input is kept."""

    keep: int
    """Entries of each token; with a threshold, as many as exceeded it on the calibration text, on average."""
    threshold: float | None = None
    groups: tuple[int, ...] | None = None
    """Entries of each group, of a method that keeps as many of every token."""


class Selector:
    """Drops entries of one input of one Block.

    Args:
        size: Entries of the input.
        device: That it is on.
        scale_D: Factors on the magnitudes, for scores; None for none.
    """

    def __init__(self, size: int, device: torch.device, scale_D: Tensor | None = None) -> None:
        self.size, self.device, self.scale_D = size, device, scale_D
        self._choice = Choice(size)  # all entries, until somebody chooses
        self.groups: Groups | None = None
        """What is kept, where it is chosen by groups."""
        self.seen: tuple[int, int] | None = None
        """Entries above a threshold and entries in all, counted when this is set to (0, 0)."""
        self.scores: Histogram | RankedEnergy | None = None
        """Told the scores of all entries, while there is one."""

    @property
    def choice(self) -> Choice:
        """How much is kept."""
        return self._choice

    @choice.setter
    def choice(self, choice: Choice) -> None:
        self._choice = choice
        self.groups = None if choice.groups is None else groups_of(choice.groups, self.device, self.scale_D)

    @property
    def of_row(self) -> bool:
        """Whether what is kept is as much of every token, chosen from all of it."""
        return self.choice.threshold is None and self.choice.groups is None

    @property
    def drops(self) -> bool:
        """Whether anything is dropped."""
        return self.choice.keep < self.size or not self.of_row

    @property
    def watched(self) -> bool:
        """Whether somebody wants to know what entries score."""
        return self.seen is not None or self.scores is not None

    @property
    def lists(self) -> bool:
        """Whether anything is dropped, and that of the whole row."""
        return self.choice.keep < self.size and self.of_row

    def masked(self, x_RD: Tensor, scale_RD: Tensor | None = None) -> Tensor:
        """Contiguous rows with zeros in the place of dropped entries.

        Args:
            x_RD: The rows.
            scale_RD: Factors of each row's own, instead of the same for all.
        """
        if not self.drops:
            return x_RD
        scale = self.scale_D if scale_RD is None else scale_RD
        if self.of_row:
            return masked(x_RD, self.choice.keep, scale)
        if self.scores is not None:
            self.scores.add(scored(x_RD, scale))
        if self.groups is not None:
            return torch.where(group_kept(scored(x_RD, scale), self.groups.keep_G), x_RD, 0)
        assert self.choice.threshold is not None, "chosen by a threshold if by nothing else"
        left_RD = above(x_RD, self.choice.threshold, scale)
        if self.seen is not None:
            self.seen = self.seen[0] + int(left_RD.count_nonzero()), self.seen[1] + left_RD.numel()
        return left_RD


def column_norms(weight_DF: Tensor) -> Tensor:
    """Norm of what each entry is multiplied by, `(D,)` in fp32 at least."""
    wide = torch.promote_types(weight_DF.dtype, torch.float32)
    return torch.linalg.vector_norm(weight_DF, dim=-1, dtype=wide)
