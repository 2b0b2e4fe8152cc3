"""What a plan would do, without doing it: every model built and every growth applied on the meta device."""

from collections.abc import Sequence
from dataclasses import fields

from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import active_parameters, parameters, training_memory
from raygrow.nn.rack import Rack
from raygrow.train.config import TrainConfig, Workers, fewest
from raygrow.train.plan import Phase
from raygrow.weights.apply import apply_rules
from raygrow.weights.shapes import meta_rack

HEADER = ("phase", "starts from", "model", "parameters", "active", "steps", "tokens", "PFLOPs", "share", "GiB/worker")


def describe(phases: Sequence[Phase], config: TrainConfig, *, workers: Workers) -> str:
    """A table of the phases: model, parameters (all, and those that one token uses), steps, tokens, FLOPs, memory.

    Args:
        phases: A resolved plan.
        config: What the phases share.
        workers: Of the phases that do not say it themselves. The fewest of a range count, for the most memory that one
            may need. `auto` precision counts as on a GPU.

    Raises:
        ValueError: If a model does not build as predicted, or a growth does not give its target's shapes.
    """
    rows: list[tuple[str, ...]] = [HEADER]
    total = sum(phase.flops for phase in phases)
    for phase in phases:
        model = _build(phase)
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != parameters(phase.model):
            raise ValueError(f"{phase.name}: {count:,} parameters built, {parameters(phase.model):,} predicted")
        rows.append(
            (
                phase.name,
                _origin(phase, phases),
                _shape(phase.model),
                f"{count:,}",
                f"{active_parameters(phase.model):,}",
                f"{phase.steps:,}",
                f"{phase.tokens:,}",
                f"{phase.flops / 1e15:,.4g}",
                f"{phase.flops / total:.1%}",
                f"{_memory(phase, config, fewest(phase.workers or workers)) / 2**30:.2f}",
            )
        )
    tokens = sum(phase.tokens for phase in phases)
    rows.append(("total", *[""] * 5, f"{tokens:,}", f"{total / 1e15:,.4g}", "100.0%", ""))
    return _table(rows)


def _build(phase: Phase) -> Rack:
    model = meta_rack(phase.model)
    if phase.growth and phase.source:
        source = dict(meta_rack(phase.source).named_parameters())
        grown = dict(apply_rules(phase.growth.grow(phase.source).rules, source))
        for name, parameter in model.named_parameters():
            if name not in grown or grown[name].shape != parameter.shape:
                raise ValueError(f"{phase.name}: growth does not give {name} of shape {tuple(parameter.shape)}")
    return model


def _origin(phase: Phase, phases: Sequence[Phase]) -> str:
    """Where the phase's model comes from, in a word or two."""
    index = phases.index(phase)
    start = phase.init or (phases[index - 1].name if index else "random weights")
    if phase.growth is None:
        return start
    settings = {field.name: (getattr(phase.growth, field.name), field.default) for field in fields(phase.growth)}
    del settings["operator"]
    # what is off, as it is by default, says nothing
    details = ", ".join(f"{name} {value}" for name, (value, default) in settings.items() if value or value != default)
    return f"{start}, {phase.growth.operator} ({details})"


def _shape(model: ModelConfig) -> str:
    blocks = f"{model.n_stacks} x {model.blocks_per_stack} blocks of d {model.d_model}"
    return f"{blocks}, {model.n_experts} experts top-{model.top_k}" if model.n_experts else blocks


def _memory(phase: Phase, config: TrainConfig, workers: int) -> int:
    rows = phase.micro_batch_rows(workers)
    return training_memory(
        phase.model,
        micro_batch_tokens=rows * phase.seq_len,
        workers=workers,
        mixed_precision=config.precision != "fp32",
        accumulates=rows < phase.worker_rows(workers),
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
