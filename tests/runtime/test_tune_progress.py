"""How far a search is: what trials share counts once. Needs no Ray that runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from raygrow.growth.gstack import Gstack
from raygrow.nn.config import ModelConfig
from raygrow.runtime.tune_progress import work
from raygrow.train.config import PhaseConfig, PlanConfig, ScheduleConfig, TrainConfig
from raygrow.train.plan import resolve
from raygrow.train.shared import Segment, segments, total_flops

TARGET = ModelConfig(vocab_size=512, d_model=16, n_heads=2, d_ff=32, blocks_per_stack=4, max_seq_len=32)
TRAIN = TrainConfig(seq_len=32, batch_size=4, report_every=2, schedule=ScheduleConfig(warmup_steps=2))
PLAN = PlanConfig(phases={"base": PhaseConfig(steps=6), "stacked": PhaseConfig(growth=Gstack(factor=2), steps=20)})


@pytest.fixture
def trials(tmp_path: Path) -> dict[str, tuple[Segment, ...]]:
    """Two trials with the same base and trunk, and of other lengths."""
    (tmp_path / "manifest.json").touch()
    longer = replace(PLAN, phases=PLAN.phases | {"stacked": replace(PLAN.phases["stacked"], steps=30)})
    phases = {"short": resolve(PLAN, TARGET, TRAIN), "long": resolve(longer, TARGET, TRAIN)}
    return {name: segments(found, TRAIN, data=tmp_path, seed=0) for name, found in phases.items()}


def flops(*found: Segment) -> float:
    return sum(segment.flops for segment in found)


def test_nothing_is_done_and_everything_left_at_first(trials: dict[str, tuple[Segment, ...]]) -> None:
    assert work(trials, {"short": 0.0, "long": 0.0}, set()) == (0.0, pytest.approx(total_flops(trials.values())))


def test_shared_stretches_are_done_once(trials: dict[str, tuple[Segment, ...]]) -> None:
    (base, trunk, tail), (_, longer_trunk, other_tail) = trials["short"], trials["long"]
    assert trunk.key == longer_trunk.key
    in_trunk = flops(base) + trunk.flops / 2
    done, left = work(trials, {"short": in_trunk, "long": flops(base)}, set())
    assert done == pytest.approx(in_trunk)
    assert left == pytest.approx(flops(longer_trunk, tail, other_tail) - trunk.flops / 2)


def test_a_trial_that_has_ended_early_leaves_nothing_of_its_own(trials: dict[str, tuple[Segment, ...]]) -> None:
    (base, _, tail), (_, longer_trunk, _) = trials["short"], trials["long"]
    reached = {"short": flops(base), "long": flops(base, longer_trunk)}
    done, left = work(trials, reached, {"long"})
    assert done == pytest.approx(flops(base, longer_trunk))
    assert left == pytest.approx(tail.flops)
    assert work(trials, reached, {"short", "long"}) == (pytest.approx(done), 0.0)
