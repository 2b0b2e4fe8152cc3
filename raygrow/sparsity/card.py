"""The card of a sparse model: what it is, what its levels skip and what they cost."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from raygrow.sparsity.allocate import SplitName
from raygrow.sparsity.config import SparsifyConfig
from raygrow.sparsity.inputs import INPUTS, Input, block_weights, input_size
from raygrow.sparsity.methods import THRESHOLDED
from raygrow.sparsity.plan import Level, SparsityPlan
from raygrow.sparsity.policy import POLICIES, Policy
from raygrow.weights.folder import ModelFolder

CARD_FILE = "README.md"

_METHODS = {
    "topk": "the largest entries of every input, as many of every token",
    "larosa": "the largest entries of every input in a calibrated basis, as many of every token (LaRoSA)",
    "wina": "the entries whose magnitude times the norm of their column is largest, as many of every token (WINA)",
    "teal": "the entries above a calibrated threshold (TEAL)",
    "rotated_wina": "in a calibrated basis, the entries whose magnitude times the norm of their column is largest, as "
    "many of every token",
    "rotated_teal": "in a calibrated basis, the entries whose magnitude times the norm of their column is above a "
    "calibrated threshold",
    "grouped": "in a calibrated basis, of each group of 32 entries those whose magnitude times the norm of their "
    "column is largest, as many of every token",
    "relu": "what is not zero: the model was trained to have many hidden units at exactly zero, and nothing else is "
    "dropped",
}
_ROTATIONS = {
    "none": "none: the weights are those of the dense model",
    "global": "one orthogonal matrix for the whole model, inside its weights; no tensors are added",
    "block": "an orthogonal matrix for each block, inside its weights, with an adapter between two blocks",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one level skips, and the losses at it."""

    sparsity: float
    nominal: float
    skipped: float
    sequence_losses: Mapping[Policy, Sequence[float]]
    """Nats per token on each sequence of the validation text, by policy."""

    @property
    def losses(self) -> dict[Policy, float]:
        """Nats per token on the whole text; of all its sequences as many tokens count."""
        return {policy: statistics.fmean(losses) for policy, losses in self.sequence_losses.items()}

    def perplexity(self, policy: Policy) -> float:
        """Of the validation text."""
        return math.exp(min(self.losses[policy], 700.0))  # beyond, a float overflows

    def rise(self, dense: "Row", policy: Policy) -> float:
        """By what share the perplexity is above that of the dense model."""
        return math.expm1(min(self.losses[policy] - dense.losses[policy], 700.0))

    def error(self, dense: "Row", policy: Policy) -> float | None:
        """Standard error of `rise`, over sequences in pairs: what they have in common is not in it. None of one."""
        pairs = zip(self.sequence_losses[policy], dense.sequence_losses[policy], strict=True)
        rises = [mine - other for mine, other in pairs]
        if len(rises) < 2:
            return None
        return statistics.stdev(rises) / math.sqrt(len(rises)) * (1 + self.rise(dense, policy))

    def told(self, dense: "Row") -> str:
        """One line."""
        return (
            f"sparsity {self.sparsity:g}: {self.skipped:.1%} of the weights skipped, perplexity "
            f"{self.perplexity('decode'):.4g} ({self.rise(dense, 'decode'):+.2%}) decoding, "
            f"{self.perplexity('all'):.4g} ({self.rise(dense, 'all'):+.2%}) with sparse prompts"
        )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where figures come from, under the names that an `EvaluationRecord` has for it."""

    device: str
    created: str
    commit: str | None
    versions: Mapping[str, str]

    def told(self, dtype: str) -> str:
        """One line."""
        held = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        return f"{dtype} on {self.device}, {self.created}, commit {self.commit or 'unknown'}, {held}"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is told about a sparse model."""

    folder: ModelFolder
    """The dense model."""
    plan: SparsityPlan
    config: SparsifyConfig
    """With `seq_len` settled."""
    taken: Mapping[float, SplitName]
    """Which kind of split each level has, where one was chosen."""
    rows: Sequence[Row]
    """The dense model, then every level."""
    rotated: Row | None
    """The model in its new bases with nothing dropped; None if it is in its own."""
    sequences: int
    """Of the validation text."""
    dtype: str
    origin: Origin

    def text(self) -> str:
        """The markdown."""
        plan, data = self.plan, self.plan.calibration.data
        return "\n".join(
            [
                f"# {_name(self.folder.path)}, sparse",
                "",
                f"Made by `raygrow sparsify` from `{self.folder.path}`. Tokens that are decoded multiply by part of "
                "the weights only; which part depends on the token.",
                "",
                f"- **method** `{plan.method}`: {_METHODS[plan.method]}",
                f"- **rotation** `{plan.rotation}`: {_ROTATIONS[plan.rotation]}",
                f"- **calibrated** {self._calibrated()}",
                f"- **made** in {self.origin.told(self.dtype)}",
                "",
                "## What it costs",
                "",
                *self._costs(),
                "",
                f"On {self.sequences} sequences of {self.config.seq_len} tokens of the validation split of `{data}`."
                " *Sparsity* is what was asked for, *nominal* the share of the blocks' weights that a token does "
                "not multiply by, *weights skipped* the same with adapters counted as read: what is saved of what "
                "the dense model's blocks read. *Of all* is what is saved of what a token reads of the dense model "
                "altogether, the head included. *Decoding* is how the model is served: the first half of each "
                "sequence is a prompt and dense, the second half is sparse and counts. *All tokens* has sparse "
                "prompts too. Behind ± is the standard error of the rise, over sequences in pairs with the dense "
                "model's.",
                "",
                "## What is kept",
                "",
                *self._kept(),
                "",
                "The mean share of an input's entries that is kept, and in brackets its least and its most of all "
                "blocks. A *split* says how a level is shared out between them.",
                "",
                "## Running it",
                "",
                "```",
                *self._commands(),
                "```",
                "",
                "MODEL is the folder of this card; the first line made it. Without a sparsity it is a dense model, the "
                "one it was made from up to rounding.",
                "",
            ]
        )

    def _calibrated(self) -> str:
        found, config, method = self.plan.calibration, self.config, self.plan.method
        whole = [
            *(["the bases"] if self.plan.rotation != "none" else []),
            *(["the thresholds"] if method in THRESHOLDED else []),
            *(["what each group keeps"] if method == "grouped" else []),
        ]
        told = [f"{' and '.join(whole)} on {found.sequences} sequences"] if whole else []
        if method == "relu":
            told.append(f"the zeros are counted on {config.searched} sequences")
        elif config.split != "uniform":
            told.append(f"splits are tried out on {config.searched} sequences")
        elif method in THRESHOLDED:
            told.append(f"their common factor on {config.searched} sequences")
        if not told:
            return "on nothing: neither the method nor the split depends on a text"
        return f"{', '.join(told)} of {found.seq_len} tokens of `{found.data}` (sha256 {found.sha256[:12]})"

    def _costs(self) -> list[str]:
        dense, *levels = self.rows
        of_all = block_weights(self.folder.config)
        of_all /= of_all + self.folder.config.vocab_size * self.folder.config.d_model
        still = [("rotated, nothing dropped", self.rotated)] if self.rotated else []
        return [
            "| sparsity | nominal | weights skipped | of all | perplexity, decoding | perplexity, all tokens |",
            "|---------:|--------:|----------------:|-------:|---------------------:|-----------------------:|",
            f"| dense | | | | {dense.perplexity('decode'):.4f} | {dense.perplexity('all'):.4f} |",
            *(f"| {name} | | | {self._perplexities(row)}" for name, row in still),
            *(
                f"| {row.sparsity:g} | {row.nominal:.1%} | {row.skipped:.1%} | {row.skipped * of_all:.1%} "
                f"{self._perplexities(row)}"
                for row in levels
            ),
        ]

    def _perplexities(self, row: Row) -> str:
        cells = []
        for policy in reversed(POLICIES):
            error = row.error(self.rows[0], policy)
            told = "" if error is None else f" ± {100 * error:.2g}"
            cells.append(f"| {row.perplexity(policy):.4f} ({row.rise(self.rows[0], policy):+.2%}{told}) ")
        return "".join(cells) + "|"

    def _kept(self) -> list[str]:
        return [
            f"| sparsity | split | {' | '.join(INPUTS)} |",
            "|---------:|:------|" + "---:|" * len(INPUTS),
            *(
                f"| {sparsity:g} | {self.taken.get(sparsity, 'none')} "
                + "".join(f"| {_share(level, name, self.folder)} " for name in INPUTS)
                + "|"
                for sparsity, level in self.plan.levels.items()
            ),
        ]

    def _commands(self) -> list[str]:
        data, given = shlex.quote(self.plan.calibration.data), []
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if field.name not in ("device", "speed") and value is not None:
                word = f"[{','.join(f'{level:g}' for level in value)}]" if isinstance(value, tuple) else value
                given.append(shlex.quote(f"{field.name}={word}"))
        evaluate = f"raygrow evaluate MODEL --data {data} --sequences {self.sequences} --seq-len {self.config.seq_len}"
        return [
            f"raygrow sparsify {shlex.quote(str(self.folder.path))} MODEL data={data} {' '.join(given)}",
            *(f"{evaluate} --sparsity {self.rows[-1].sparsity:g} --policy {policy}" for policy in reversed(POLICIES)),
        ]


def _name(path: Path) -> str:
    """Of a model; of a run's own, the run's."""
    path = path.resolve()
    return path.parent.name if (path.parent / "run.yaml").exists() else path.name


def _share(level: Level, name: Input, folder: ModelFolder) -> str:
    """What is kept of an input, over Blocks."""
    kept = [
        choice.keep / input_size(folder.config, *place) for place, choice in level.choices.items() if place[1] == name
    ]
    return f"{statistics.fmean(kept):.0%} ({min(kept):.0%} to {max(kept):.0%})"
