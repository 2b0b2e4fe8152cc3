"""Work that trials share: each distinct stretch of training is done once, and its state forked.

A plan is cut into segments. In every phase, the steps before its learning rate depends on the phase's length make a
*trunk*, the same for all budgets and decays; what is left is the phase's *tail*. Trunks end at whole
`train.report_every` intervals, so that a fork's lines of history are those of the run trained alone, to the bit on CPU
in fp32 (and on CUDA under `train.deterministic=true`). Plans need no rounding: what a phase has beyond its last whole
interval is a short tail. A phase whose length is a multiple of `report_every` and that does not decay has none.
"""

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raygrow.data.shards import fingerprint
from raygrow.nn.config import ModelConfig
from raygrow.train.config import TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import Phase
from raygrow.train.probes import CURES
from raygrow.train.schedule import decay_start
from raygrow.train.session import Record, checkpoint_name
from raygrow.train.states import GROWTH, States, StatesSession

SCORES = ("val_loss", "val_bits_per_byte", *CURES)
"""What an evaluation adds to a line of history."""


@dataclass(frozen=True)
class Segment:
    """A stretch of steps of one phase, whose outcome depends on its key and its `stop` alone."""

    key: str
    """Names all that decides the state after any step: also the parent, but not how far the segment goes."""
    phase: Phase
    start: int
    """Steps of the phase before this segment."""
    stop: int
    """Steps of the phase after it."""
    parent: tuple[str, int] | None
    """Key and stop of the segment that this one goes on from, in the same phase where `start` is not 0."""
    evaluate_every: int

    @property
    def flops(self) -> float:
        """FLOPs that the segment spends."""
        return (self.stop - self.start) * self.phase.step_tokens * self.phase.flops_per_token


def segments(phases: tuple[Phase, ...], config: TrainConfig, *, data: Path, seed: int) -> tuple[Segment, ...]:
    """Cuts a resolved plan into segments, in order; each one's parent is the one before it.

    Args:
        phases: The plan.
        config: What its phases share.
        data: Prepared data folder.
        seed: Of initial weights and data order.
    """
    run = {"seed": seed, "data": fingerprint(data), "train": _shared_settings(config)}
    found: list[Segment] = []
    for phase in phases:
        fork = _fork_step(phase, config.report_every)
        for start, stop in ((0, fork), (fork, phase.steps)):
            if start == stop:
                continue
            parent = (found[-1].key, found[-1].stop) if found else None
            settings = _trunk_settings(phase)
            if stop != fork:
                settings |= {"steps": phase.steps, "schedule": asdict(phase.schedule)}
            key = _hash({"run": run, "phase": settings, "parent": parent})
            found.append(Segment(key, phase, start, stop, parent, config.evaluate_every))
    return tuple(found)


def total_flops(trials: Iterable[Sequence[Segment]]) -> float:
    """FLOPs of training all trials with shared work: every distinct stretch once."""
    longest: dict[str, float] = {}
    for trial in trials:
        for segment in trial:
            longest[segment.key] = max(segment.flops, longest.get(segment.key, 0.0))
    return sum(longest.values())


def spent_flops(states: Path) -> float:
    """FLOPs that were trained in a folder of states, counted at every report: what was done twice counts twice.

    Equals `total_flops` where all trials came to their end and nothing was lost on the way. What a dead process trained
    after its last report is in neither.
    """
    return sum(States(folder).spent for folder in _folders(states))


def _fork_step(phase: Phase, report_every: int) -> int:
    """The last whole report interval up to which the learning rate would be the same in a longer phase."""
    # a phase shorter than its warmup climbs faster
    alike = decay_start(phase.steps, phase.schedule) if phase.schedule.warmup_steps <= phase.steps else 0
    return alike // report_every * report_every


def _trunk_settings(phase: Phase) -> dict[str, Any]:
    """What decides a phase's training before its learning rate decays.

    All that is not known to be without effect counts, so that a new setting cannot be forgotten.
    """
    without_effect = ("steps", "schedule", "workers", "save_start", "save_end")
    settings = {name: value for name, value in asdict(phase).items() if name not in without_effect}
    return settings | {
        "model": _without_grouping(phase.model),
        "source": phase.source and _without_grouping(phase.source),
        "init": phase.init and str(Path(phase.init).resolve()),
        "micro_batch_size": phase.micro_batch_rows(1),
        "warmup_steps": phase.schedule.warmup_steps,
    }


def _without_grouping(model: ModelConfig) -> dict[str, Any]:
    return asdict(model.regrouped(1))


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    # phases have their own
    settings = asdict(replace(config, optimizer=replace(config.optimizer, lr=1.0), activation_l1=0.0))
    for name in ("schedule", "batch_size", "micro_batch_size", "checkpoint_every", "keep_checkpoints"):
        del settings[name]
    return settings


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def train_segment(
    segment: Segment,
    config: TrainConfig,
    *,
    states: Path,
    data: Path,
    seed: int,
    device: str,
    save_at: Sequence[int] = (),
    on_record: Callable[[Record], None] = lambda record: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Makes the state at a segment's stop, from the nearest state before it. Does nothing where it is there already.

    This process trains alone, and must be the only one at work on the segment's key. Whatever ends it, the states that
    are there can be used. They are those of one kind of device: `auto` settings mean something else on another.

    Args:
        segment: What to train; its parent must be trained.
        config: What the run's phases share.
        states: Folder of all states, shared by all trials.
        data: Prepared data folder.
        seed: Of initial weights and data order.
        device: `cpu` or `cuda:<i>`.
        save_at: Steps at which other trials fork from this segment, multiples of `train.report_every`. Those that
            it passes on its way are kept.
        on_record: Told every new line of history.
        stop_requested: Whether to save and stop, asked at every report.

    Returns:
        How it ended, as `train_phase` does.

    Raises:
        FileNotFoundError: If the parent has not been trained.
    """
    own = States(states / segment.key)
    own.keep([*save_at, segment.stop])
    if is_trained(segment, states):
        return Outcome("finished")
    parent = segment.parent and states / segment.parent[0] / checkpoint_name(segment.parent[1])
    if parent and not parent.is_dir():
        raise FileNotFoundError(f"{segment.phase.name} goes on from {parent}, which is not there: train that first")
    session = StatesSession(
        own,
        start=parent if segment.start else None,
        first_step=segment.start,
        stop=segment.stop,
        step_flops=segment.phase.step_tokens * segment.phase.flops_per_token,
        kept={*save_at, segment.stop},
        on_record=lambda line: on_record(_as_alone(line, segment)),
        wants_stop=stop_requested,
    )
    with _alone(device):
        return train_phase(
            segment.phase,
            config,
            data=data,
            seed=seed,
            source=None if segment.start else parent,
            session=session,
            device=device,
            until=segment.stop,
            save_at=save_at,
        )


def is_trained(segment: Segment, states: Path) -> bool:
    """Whether the state at a segment's stop is there."""
    return States(states / segment.key).is_kept(segment.stop)


def history_of(segments: Sequence[Segment], states: Path) -> list[Record]:
    """The lines of history of a trial, in order, as far as there are states of it."""
    lines: list[Record] = []
    for segment in segments:
        own = States(states / segment.key)
        step = own.newest(segment.stop)
        lines += [_as_alone(line, segment) for line in own.history(step)] if step is not None else []
        if step != segment.stop:
            break
    return lines


def growths_of(segments: Sequence[Segment], states: Path) -> dict[str, Path]:
    """The records of a trial's growths that have happened, by phase."""
    files = {segment.phase.name: states / segment.key / GROWTH for segment in segments if not segment.start}
    return {phase: file for phase, file in files.items() if file.exists()}


def remove_unkept(states: Path) -> None:
    """Removes all that no trial forks from or ends with. For a search that is over: nothing may be training."""
    for folder in _folders(states):
        States(folder).remove_unkept()


def _folders(states: Path) -> list[Path]:
    return list(states.iterdir()) if states.is_dir() else []


def _as_alone(line: Record, segment: Segment) -> Record:
    """A line without the scores that only other trials asked for."""
    step = line["step"]
    if step % segment.evaluate_every == 0 or step == segment.phase.steps:
        return line
    return {name: value for name, value in line.items() if name not in SCORES}


@contextmanager
def _alone(device: str) -> Iterator[None]:
    """A process group of this process alone, where there is none."""
    if dist.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
            gc.collect()  # FSDP's hooks and modules refer to each other, so the memory would stay taken
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
