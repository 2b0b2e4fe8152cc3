"""Learning rate as a function of the step."""

import math

from raygrow.train.config import ScheduleConfig


def learning_rate(step: int, *, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) in a phase of `steps` steps.

    `wsd` warms up linearly, stays at the peak, and decays linearly over the last `decay` share of the phase
    (warmup-stable-decay, arXiv 2404.06395). `cosine` decays from the end of warmup.
    """
    warmup, start = min(schedule.warmup_steps, steps), decay_start(steps, schedule)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step < start:
        return peak
    share = (step - start + 1) / (steps - start)
    height = (1 + math.cos(math.pi * share)) / 2 if schedule.kind == "cosine" else 1 - share
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * height)


def decay_start(steps: int, schedule: ScheduleConfig) -> int:
    """The first step below the peak again, in a phase of `steps` steps; `steps` where it does not decay."""
    warmup = min(schedule.warmup_steps, steps)
    return warmup if schedule.kind == "cosine" else max(steps - round(schedule.decay * steps), warmup)
