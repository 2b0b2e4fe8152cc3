"""Settings of training: what a run's phases share, and what one phase may change."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from raygrow.growth.operator import GrowthConfig

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Workers = PositiveInt | tuple[PositiveInt, PositiveInt]
"""How many train; a pair is an elastic range, and the run goes on with whatever is there."""
SAVED_HISTORY = "training_history.jsonl"
"""Stands beside the models that a plan saves."""


def fewest(workers: Workers) -> int:
    """The smallest number of workers."""
    return workers if isinstance(workers, int) else workers[0]


def check_workers(key: str, workers: Workers) -> None:
    """Refuses a range that does not rise."""
    if not isinstance(workers, int) and workers[0] > workers[1]:
        raise ValueError(f"{key}={list(workers)}: a range begins with the smaller number, such as [1, 4]")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices only."""

    lr: Amount = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Amount = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip: Amount = 1.0
    """Largest norm of the whole gradient."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over a phase. Only a run's last phase decays, unless a phase says so itself."""

    kind: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: NonNegativeInt = 100
    decay: Share = 0.2
    """Share of the run, in FLOPs, that is spent decaying at its end (wsd, linear), at most all of the last phase: runs
    that grow early and late decay alike. A cosine decays from the end of the last phase's warmup."""
    final_ratio: Share = 0.0
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the phases of a run share."""

    seq_len: PositiveInt = 512
    batch_size: PositiveInt = 64
    """Sequences in one optimizer step, over all workers."""
    micro_batch_size: NonNegativeInt = 0
    """Sequences in one forward pass of one worker; 0 takes the worker's whole share."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 mixed precision on CUDA, fp32 on CPU. Master weights and Adam's moments are fp32 in both."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of every Block; `auto` compiles on CUDA."""
    activation_checkpointing: bool = False
    reshard_after_forward: Literal["auto", "on", "off"] = "auto"
    """Whether a Block's gathered weights are freed until the backward pass gathers them again. `auto` does so with
    several workers. A single worker gains room for the bf16 copy of the weights, 2 bytes a parameter, and converts
    every weight twice a step."""
    deterministic: bool = False
    """Bit-exact resume on CUDA too, at some cost in speed."""
    load_balancing: NonNegativeFloat = 0.01
    """Weight of the load-balancing loss of a model with experts (their mean over its Blocks)."""
    activation_l1: NonNegativeFloat = 0.0
    """Weight of the mean absolute value of hidden units (over units and Blocks), which keeps more of them at exactly
    zero; for models whose `mlp` is `reglu`, `relu` or `relu2`."""
    report_every: PositiveInt = 10
    """Steps between two lines of history.jsonl."""
    evaluate_every: PositiveInt = 100
    evaluate_sequences: NonNegativeInt = 64
    """Validation sequences scored at each evaluation, always the same ones; 0 takes all."""
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept per phase."""
    diverged_above: Amount = 2.0
    """Stop when the loss is this many nats above the lowest reported loss of the phase."""

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "checkpoint_every"):
            if getattr(self, name) % self.report_every:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of report_every={self.report_every}")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One stage of a plan. A field left out takes the run's value (`train.*`)."""

    growth: GrowthConfig | None = None
    """Applied to the model of the phase before, as this phase starts."""
    max_loss_jump: float | None = None
    """Nats that the validation loss may rise at growth; more ends the run."""
    optimizer_state: Literal["copy", "drop", "asymmetric"] = "copy"
    """What happens to Adam's moments and step counts at growth: each parameter takes those of the parameters that it
    is made of, all start afresh, or only the first of several copies takes them (see `weights/moments.py`)."""
    init: str | None = None
    """A model folder (raygrow's or Hugging Face's) to start from."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Budget as a share of the plan's FLOPs. One of share, tokens, flops, steps; none takes what is left."""
    tokens: Amount | None = None
    flops: Amount | None = None
    steps: PositiveInt | None = None
    seq_len: PositiveInt | None = None
    """Must divide `train.seq_len`."""
    batch_size: PositiveInt | None = None
    micro_batch_size: NonNegativeInt | None = None
    lr: Amount | None = None
    warmup_steps: NonNegativeInt | None = None
    decay: Share | None = None
    """Share of this phase's steps, instead of `train.schedule.decay`, which is of the run."""
    activation_l1: NonNegativeFloat | None = None
    frozen: tuple[str, ...] = ()
    """Parameters that do not train, as shell patterns over their names (`blocks.0.*`)."""
    workers: Workers | None = None
    save_start: str | None = None
    """Name of a model folder, `models/<name>` in the run's, for the model as this phase begins, after growth."""
    save_end: str | None = None
    """Name of a model folder for the model as this phase ends."""

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_workers("workers", self.workers)
        for key in ("save_start", "save_end"):
            name = getattr(self, key)
            if name is not None and not (name and "/" not in name and not name.startswith(".")):
                raise ValueError(f"{key}={name!r}: must be the plain name of a folder, without a slash or leading dot")
            if name == SAVED_HISTORY:
                raise ValueError(f"{key}={name}: the run's history has this name, choose another")
        if self.optimizer_state == "asymmetric" and (self.growth is None or self.init):
            raise ValueError(
                "optimizer_state=asymmetric: says which copies keep their state when a model in training is grown, so "
                "the phase needs a growth and no `init` folder, which holds no state"
            )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A run's phases, in order, and its budget.

    The budget counts every phase: `tokens` is converted at the final model's FLOPs per token, so that a plan costs
    what training the final model from scratch on that many tokens would.
    """

    tokens: Amount | None = None
    flops: Amount | None = None
    phases: dict[str, PhaseConfig]
