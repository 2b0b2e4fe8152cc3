"""From a plan and its target to the phases that run: models, steps, tokens, FLOPs and learning rates all settled.

A plan is written from its target. Walking backward, each growth is shrunk away (`shrink`), which gives the base;
walking forward, each growth is applied (`grow`), which gives the model of every phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch

from raygrow.growth.blocks import split_name
from raygrow.growth.operator import GrowthConfig
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import training_flops_per_token
from raygrow.train.config import PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.weights.folder import open_folder
from raygrow.weights.shapes import parameter_shapes


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase with nothing left to decide. `tokens` and `flops` before it count the phases before it."""

    name: str
    model: ModelConfig
    source: ModelConfig | None
    """The model this phase starts from, where it starts from one."""
    growth: GrowthConfig | None
    max_loss_jump: float | None
    optimizer_state: str
    init: str | None
    steps: int
    seq_len: int
    batch_size: int
    micro_batch_size: int
    lr: float
    schedule: ScheduleConfig
    activation_l1: float
    frozen: tuple[str, ...]
    workers: int | tuple[int, int] | None
    save_start: str | None
    save_end: str | None
    tokens_before: int
    flops_before: float
    flops_per_token: float

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step, over all workers."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens that this phase trains on."""
        return self.steps * self.step_tokens

    @property
    def flops(self) -> float:
        """FLOPs that this phase spends."""
        return self.tokens * self.flops_per_token

    def worker_rows(self, workers: int) -> int:
        """Sequences of one step that each of `workers` workers trains on."""
        return -(-self.batch_size // workers)

    def micro_batch_rows(self, workers: int) -> int:
        """Sequences in one forward pass of each of `workers` workers."""
        rows = self.worker_rows(workers)
        return min(self.micro_batch_size or rows, rows)

    @property
    def first_sample(self) -> int:
        """Where this phase goes on in the data; rounded up where the sequence length has changed."""
        return -(-self.tokens_before // self.seq_len)


def resolve(plan: PlanConfig, target: ModelConfig, train: TrainConfig) -> tuple[Phase, ...]:
    """Settles every phase of a plan.

    Args:
        plan: The plan as written.
        target: The final model.
        train: What phases share.

    Raises:
        ValueError: If the plan cannot be carried out; the message names the phase and the key.
    """
    if not plan.phases:
        raise ValueError("plan.phases is empty: a plan needs at least one phase")
    _check_saves(plan)
    models = _models(plan, target)
    total = _total_flops(plan, target, train)
    phases: list[Phase] = []
    for name, config in plan.phases.items():
        is_last = len(phases) == len(plan.phases) - 1
        phases.append(_settle(name, config, models[name], phases, total, train, is_last=is_last))
    _check_budget(plan, phases, total)
    return tuple(phases)


def scratch_plan(phases: tuple[Phase, ...]) -> PlanConfig:
    """The control of a plan: its final model from scratch on the same FLOPs.

    It takes the last phase's batch, peak learning rate and weight of activations, and decays over as many FLOPs; its
    warmup is the run's own (`train.schedule`), since a re-warmup after growth says nothing about a fresh model.
    """
    last, flops = phases[-1], sum(phase.flops for phase in phases)
    phase = PhaseConfig(
        seq_len=last.seq_len,
        batch_size=last.batch_size,
        micro_batch_size=last.micro_batch_size,
        lr=last.lr,
        decay=round(last.schedule.decay * last.flops / flops, 9),
        activation_l1=last.activation_l1,
        workers=last.workers,
    )
    return PlanConfig(flops=flops, phases={"scratch": phase})


def _models(plan: PlanConfig, target: ModelConfig) -> dict[str, ModelConfig]:
    """The model of every phase: shrunk back from the target to the base, then grown forward again."""
    model = target
    for name, phase in reversed(plan.phases.items()):
        if phase.growth:
            try:
                model = phase.growth.shrink(model)
            except ValueError as error:
                raise ValueError(f"plan.phases.{name}.growth: {error}") from None
    models = {}
    for name, phase in plan.phases.items():
        if phase.growth:
            if not models and not phase.init:
                raise ValueError(
                    f"plan.phases.{name}.growth: the first phase has no model to grow: put a phase before it, "
                    "or name a model folder in `init`"
                )
            model = phase.growth.grow(model).config
        models[name] = model
    return models


def _total_flops(plan: PlanConfig, target: ModelConfig, train: TrainConfig) -> float | None:
    if plan.tokens is not None and plan.flops is not None:
        raise ValueError("plan.tokens and plan.flops are both set: keep one of them")
    if plan.tokens is not None:
        return plan.tokens * training_flops_per_token(target, train.seq_len)
    return plan.flops


def _settle(
    name: str,
    config: PhaseConfig,
    model: ModelConfig,
    before: list[Phase],
    total: float | None,
    train: TrainConfig,
    *,
    is_last: bool,
) -> Phase:
    seq_len = config.seq_len or train.seq_len
    batch_size = config.batch_size or train.batch_size
    parameters = list(parameter_shapes(model))
    _check_frozen(name, config.frozen, parameters)
    trained = _trained_units(parameters, config.frozen)
    flops_per_token = training_flops_per_token(model, seq_len, trains=trained.__contains__)
    flops_before = sum(phase.flops for phase in before)
    steps = _steps(name, config, total, flops_before, flops_per_token, batch_size * seq_len)
    flops = steps * batch_size * seq_len * flops_per_token
    source = _source(name, config, before, model)
    if train.seq_len % seq_len:
        raise ValueError(f"plan.phases.{name}.seq_len={seq_len} does not divide train.seq_len={train.seq_len}")
    return Phase(
        name=name,
        model=model,
        source=source,
        growth=config.growth,
        max_loss_jump=config.max_loss_jump,
        optimizer_state=config.optimizer_state,
        init=config.init,
        steps=steps,
        seq_len=seq_len,
        batch_size=batch_size,
        micro_batch_size=train.micro_batch_size if config.micro_batch_size is None else config.micro_batch_size,
        lr=train.optimizer.lr if config.lr is None else config.lr,
        schedule=_schedule(config, train.schedule, flops / (flops_before + flops), is_last=is_last),
        activation_l1=_activation_l1(name, config, model, train),
        frozen=config.frozen,
        workers=config.workers,
        save_start=config.save_start,
        save_end=config.save_end,
        tokens_before=sum(phase.tokens for phase in before),
        flops_before=flops_before,
        flops_per_token=flops_per_token,
    )


def _steps(
    name: str, config: PhaseConfig, total: float | None, spent: float, flops_per_token: float, step_tokens: int
) -> int:
    budgets = [key for key in ("share", "tokens", "flops", "steps") if getattr(config, key) is not None]
    if len(budgets) > 1:
        raise ValueError(f"plan.phases.{name} sets {' and '.join(budgets)}: a phase has one budget")
    if config.steps is not None:
        steps = config.steps
    elif config.tokens is not None:
        steps = round(config.tokens / step_tokens)
    else:
        if config.flops is not None:
            flops = config.flops
        elif total is None and config.share is not None:
            raise ValueError(
                f"plan.phases.{name}.share={config.share:g} is of the plan's budget, and the plan has none: "
                "set plan.tokens or plan.flops"
            )
        elif total is None:
            raise ValueError(
                f"plan.phases.{name} has no budget of its own and the plan has none either: "
                "set plan.tokens or plan.flops, or the phase's steps, tokens or flops"
            )
        else:
            flops = total * config.share if config.share is not None else total - spent
        if flops <= 0:
            raise ValueError(
                f"plan.phases.{name}: the plan's budget of {total:.3g} FLOPs is used up by the phases before it "
                f"({spent:.3g} FLOPs), so this phase would never run: raise plan.tokens or shorten those phases"
            )
        steps = round(flops / flops_per_token / step_tokens)
    if steps < 1:
        raise ValueError(
            f"plan.phases.{name}: its budget is less than one step of {step_tokens:,} tokens: "
            "raise the budget or lower batch_size"
        )
    return steps


def _trained_units(parameters: Sequence[str], frozen: tuple[str, ...]) -> set[str]:
    """The units of a model (`embedding`, `blocks.3`, `head`) of which any parameter is left to train."""
    trained = (split_name(name) for name in parameters if not is_frozen(name, frozen))
    return {rest.split(".")[0] if block is None else f"blocks.{block}" for block, rest in trained}


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter's name matches one of the shell patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_frozen(name: str, patterns: tuple[str, ...], parameters: Sequence[str]) -> None:
    key = f"plan.phases.{name}.frozen={list(patterns)}"
    for pattern in patterns:
        if not any(is_frozen(parameter, (pattern,)) for parameter in parameters):
            raise ValueError(f"{key}: the pattern {pattern!r} matches no parameter of the model")
    if all(is_frozen(parameter, patterns) for parameter in parameters):
        raise ValueError(f"{key}: no parameter is left to train")


def _source(name: str, config: PhaseConfig, before: list[Phase], model: ModelConfig) -> ModelConfig | None:
    """The config of the model that this phase starts from, checked against the folder named in `init`."""
    expected = config.growth.shrink(model) if config.growth else model
    if config.init is None:
        return before[-1].model if before else None
    found = open_folder(config.init).config
    # neither the grouping into Stacks nor the longest sequence changes a tensor
    planned, stored = expected.regrouped(1), replace(found.regrouped(1), max_seq_len=expected.max_seq_len)
    differing = [
        f"{field.name} is {getattr(stored, field.name)!r}, the plan needs {getattr(planned, field.name)!r}"
        for field in fields(ModelConfig)
        if getattr(stored, field.name) != getattr(planned, field.name)
    ]
    if differing:
        raise ValueError(f"plan.phases.{name}.init={config.init}: another model than planned: {'; '.join(differing)}")
    return found


def _schedule(config: PhaseConfig, shared: ScheduleConfig, share: float, *, is_last: bool) -> ScheduleConfig:
    """Only the last phase decays, so that every growth starts from a base still at its peak learning rate.

    `share` is what the phase is of all that the run has then spent: decay is a share of the run.
    """
    if is_last:
        schedule = replace(shared, decay=min(1.0, shared.decay / share))
    else:
        schedule = replace(shared, kind="wsd", decay=0.0)
    if config.decay is not None:
        schedule = replace(schedule, decay=config.decay)
    if config.warmup_steps is not None:
        schedule = replace(schedule, warmup_steps=config.warmup_steps)
    return schedule


def _activation_l1(name: str, config: PhaseConfig, model: ModelConfig, train: TrainConfig) -> float:
    """Refused where no hidden unit can be zero: the loss would rise for nothing."""
    key, weight = f"plan.phases.{name}.activation_l1", config.activation_l1
    if weight is None:
        key, weight = "train.activation_l1", train.activation_l1
    if weight and not model.rectified:
        raise ValueError(
            f"{key}={weight:g}: hidden units of mlp={model.mlp} are never exactly zero; choose mlp=reglu, relu or "
            "relu2, or leave it at 0"
        )
    return weight


def _check_saves(plan: PlanConfig) -> None:
    saved: dict[str, str] = {}
    for name, phase in plan.phases.items():
        for key, folder in (("save_start", phase.save_start), ("save_end", phase.save_end)):
            where = f"plan.phases.{name}.{key}"
            if folder in saved:
                raise ValueError(f"{where}={folder}: {saved[folder]} has the same name, choose another")
            if folder is not None:
                saved[folder] = where


def _check_budget(plan: PlanConfig, phases: list[Phase], total: float | None) -> None:
    spent = sum(phase.flops for phase in phases)
    one_step = max(phase.step_tokens * phase.flops_per_token for phase in phases)
    if total is not None and spent > total + one_step:
        names = ", ".join(plan.phases)
        raise ValueError(
            f"the phases {names} add up to {spent:.3g} FLOPs, more than the plan's {total:.3g}: "
            f"{spent / total:.0%} of it. Lower their budgets, or leave one without a budget to take what is left"
        )
