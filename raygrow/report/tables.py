"""The tables of a report: what runs cost, how growth was verified, where metrics stood, what was set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from raygrow.report import units
from raygrow.report.compare import TIE, Comparison
from raygrow.report.runs import Run


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of finished text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    words: bool = False
    """Whether all columns hold words; figures are set to the right."""


def runs_table(runs: list[Run]) -> Table:
    """One row per run: its cost and where it stands."""
    rows = [
        [
            run.name,
            run.status,
            units.count(run.last("tokens")),
            units.flops(run.last("flops")),
            units.duration(run.last("seconds")),
            units.number(run.last("val_loss")),
            units.number(run.last("val_bits_per_byte")),
            units.count(run.last("tokens_per_second")),
            units.percent(run.last("mfu")),
        ]
        for run in runs
    ]
    header = ["run", "status", "tokens", "FLOPs", "time", "val loss", "bits/byte", "tokens/s", "MFU"]
    return without_empty_columns(Table(title="Runs", header=header, rows=rows))


def comparison_table(comparisons: list[Comparison]) -> Table:
    """What each loss cost, both ways: where scratch ended and where growth ended."""
    rows = []
    several = len({c.scratch for c in comparisons}) > 1
    for c in comparisons:
        for at, seconds in ((c.reached, c.reached_seconds), (c.beyond, None)):
            rows.append(
                [
                    f"{c.grown} / {c.scratch}" if several else c.grown,
                    units.number(at.loss),
                    units.flops(at.grown) if at.grown else "never",
                    units.flops(at.scratch) if at.scratch else "never",
                    units.percent(at.speedup, signed=True),
                    units.percent(seconds.speedup if seconds else None, signed=True),
                ]
            )
    return Table(
        title="Speedup at equal loss",
        header=["run", "val loss", "FLOPs grown", "FLOPs scratch", "speedup", "in time"],
        rows=rows,
        note="Speedup = FLOPs from scratch / FLOPs grown - 1, the base model's FLOPs counted; read off between "
        "evaluations by straight lines. A run that passes a loss before its learning rate has decayed would have "
        "passed it earlier, had it been planned to end there. One run of each kind: another seed may move a loss by "
        f"about {TIE:g} nats.",
    )


def growth_table(runs: list[Run]) -> Table:
    """The verification of every growth."""
    rows = []
    for run in runs:
        for phase, v in run.growths.items():
            operator = dict(v["operator"])
            name = operator.pop("operator", "growth")
            jump, allowed = _jump(v["loss_jump"]), v.get("max_loss_jump")
            rows.append(
                [
                    _label(run, phase, runs),
                    # zeros and empty lists say that something is off or left to another setting
                    " ".join([name, *(f"{key}={value}" for key, value in operator.items() if value or value is False)]),
                    f"{units.count(v['source_parameters'])} → {units.count(v['parameters'])}",
                    units.significant(v["output_difference"]),
                    units.significant(_largest(v, "residual")),
                    units.significant(_largest(v, "router")),
                    f"{units.number(v['loss_before'])} → {units.number(v['loss_after'])}",
                    jump if allowed is None else f"{jump} (at most {allowed:g})",
                    "passed" if v["passed"] else "FAILED",
                ]
            )
    header = ["phase", "operator", "parameters", "outputs", "blocks", "routers", "val loss", "jump", "verified"]
    note = (
        "How far growth moved the outputs (of the largest logit), the residual stream after the worst Block and the "
        "worst router's logits (of their size): rounding where the growth keeps the function, drift where it does not."
    )
    return without_empty_columns(Table(title="Growth", header=header, rows=rows, note=note))


def _jump(nats: float | None) -> str:
    """A rise of the loss; one that three decimals would hide in full."""
    return units.number(nats) if nats is None or abs(nats) >= 0.01 else units.significant(nats)


def _largest(verification: dict[str, Any], key: str) -> float | None:
    """The largest of a figure over Blocks; none where no Block has it."""
    return max((block[key] for block in verification.get("blocks", []) if block[key] is not None), default=None)


def checks_table(runs: list[Run]) -> Table:
    """The single checks behind each verification."""
    rows = [
        [_label(run, phase, runs), check["name"], "passed" if check["passed"] else "FAILED", str(check["detail"])]
        for run in runs
        for phase, verification in run.growths.items()
        for check in verification.get("checks", [])
    ]
    return Table(title="Growth checks", header=["phase", "check", "result", "detail"], rows=rows, words=True)


def phases_table(runs: list[Run]) -> Table:
    """What each phase trained and cost."""
    rows = []
    for run in runs:
        for phase in run.phases:
            spent = phase.end_flops - phase.start_flops
            rows.append(
                [
                    _label(run, phase.name, runs),
                    str(phase.n_blocks or units.DASH),
                    units.count(phase.parameters),
                    units.count(None if phase.active_parameters == phase.parameters else phase.active_parameters),
                    str(phase.steps),
                    units.count(phase.tokens),
                    units.flops(spent),
                    units.percent(spent / run.history[-1]["flops"]),
                    units.duration(phase.end_seconds - phase.start_seconds),
                    units.number(phase.newest.get("val_loss")),
                ]
            )
    header = ["phase", "blocks", "parameters", "active", "steps", "tokens", "FLOPs", "share", "time", "val loss"]
    return without_empty_columns(Table(title="Phases", header=header, rows=rows))


METRIC_NOTES = {
    "memory_bytes": "Memory is the most that one worker has held.",
    "expert_load_max": "Load is that of the most and the least used expert of any Block, 1 being an even share.",
    "active_share": "Active is the share of hidden units that are not zero, and hidden size their mean magnitude.",
    "head_divergence": "Copies of heads are 0 apart where they are the same, about 1 where they are unrelated.",
    "expert_divergence": "Copies of experts are 0 apart where they are the same, about 1 where they are unrelated.",
}


def metrics_table(runs: list[Run]) -> Table:
    """Where every metric stood when a phase ended."""
    kinds: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "loss": ("loss", units.number),
        "val_loss": ("val loss", units.number),
        "val_bits_per_byte": ("bits/byte", units.number),
        "grad_norm": ("gradient", units.significant),
        "tokens_per_second": ("tokens/s", units.count),
        "mfu": ("MFU", units.percent),
        "memory_bytes": ("memory", units.memory),
        "balance_loss": ("balance", units.number),
        "expert_load_max": ("load, most", units.significant),
        "expert_load_min": ("least", units.significant),
        "activation_l1": ("hidden size", units.significant),
        "active_share": ("active", units.percent),
        "head_divergence": ("heads apart", units.significant),
        "expert_divergence": ("experts apart", units.significant),
    }
    rows = [
        [_label(run, phase.name, runs), *(show(phase.newest.get(key)) for key, (_, show) in kinds.items())]
        for run in runs
        for phase in run.phases
    ]
    found = {key for run in runs for phase in run.phases for key in phase.newest}
    note = " ".join(text for key, text in METRIC_NOTES.items() if key in found)
    header = ["phase", *(name for name, _ in kinds.values())]
    return without_empty_columns(Table(title="At the end of each phase", header=header, rows=rows, note=note))


def _label(run: Run, phase: str, runs: list[Run]) -> str:
    """What to call a phase: with its run's name where there are several runs."""
    return phase if len(runs) == 1 else f"{run.name}: {phase}"


def settings_table(runs: list[Run]) -> Table:
    """Every setting of every run, those that differ first."""
    flat = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(settings.get(key, units.DASH) for settings in flat)] for key in keys]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return Table(title="Settings", header=["setting", *(run.name for run in runs)], rows=rows, words=True)


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """A settings tree as dotted keys and text; what is not set is left out."""
    if isinstance(tree, dict):
        return {
            dotted: text
            for key, value in tree.items()
            for dotted, text in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {} if tree is None else {prefix: str(tree)}


def without_empty_columns(table: Table) -> Table:
    """A CPU run has no MFU, a run in progress no phase's depth: such columns are left out."""
    kept = [i for i in range(len(table.header)) if any(row[i] != units.DASH for row in table.rows)]
    return replace(table, header=[table.header[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])
