"""Stopping trials early: who is held against whom, where, and at which loss. Needs no Ray that runs."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raygrow.config import build
from raygrow.runtime.choosing import AshaOnFlops, Heat, Points, chooser, heats
from raygrow.space import SpaceConfig
from raygrow.trials import Search
from tests.composed import composed

SHARE = "plan.phases.base.share"
BASE = "plan.phases.base.tokens"
GRID = {"plan.tokens": {"grid": [10e6, 20e6]}, BASE: {"grid": [1e6, 2e6]}, "seed": {"grid": [0, 1]}}


def search(space: dict[str, Any]) -> Search:
    return Search(composed("plan=gstack"), build(SpaceConfig, {"space": space}, "space"))


class Tune:
    """Tune's part, with the evaluations made up."""

    def __init__(self, asha: AshaOnFlops) -> None:
        self.asha = asha

    def add(self, name: str, *, finished: bool = False) -> Any:
        trial = SimpleNamespace(trial_id=name, config={"name": name}, is_finished=lambda: finished)
        self.asha.on_trial_add(None, trial)  # type: ignore[arg-type]
        return trial

    def goes_on(self, trial: Any, flops: float, loss: float, *, phase: str = "stacked", ends: bool = False) -> bool:
        result = {"flops": flops, "val_loss": loss, "phase": phase, "ends": ends}
        return self.asha.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE


@pytest.fixture(scope="module")
def budgets() -> Search:
    return search(GRID)


def asha(found: Search, *, scores: Any = lambda trial: [], grace: float = 0.1) -> AshaOnFlops:
    return AshaOnFlops(found.trial_of, scores, heats(found.corners, grace=grace), reduction_factor=2)


def name(tokens: int, base: int, seed: int = 0) -> str:
    return f"plan.tokens-{tokens}_base.tokens-{base}_seed-{seed}"


def test_large_budgets_begin_first_and_all_else_is_as_the_space_has_it(budgets: Search) -> None:
    points = chooser(budgets)
    names = [points.suggest(str(number))["name"] for number in range(len(budgets.fixed))]  # type: ignore[index]
    listed = [trial.name for trial in budgets.fixed]
    long = [name for name in listed if "plan.tokens-20" in name]
    assert names == long + [name for name in listed if name not in long]


def trial_at(values: Mapping[str, Any]) -> Any:
    """A growth by 1 is the fixed trial."""
    grown = "_".join(f"{key}-{value}" for key, value in sorted(values.items()))
    return SimpleNamespace(name="scratch" if values["factor"] == 1 else grown)


def points() -> Points:
    """A fixed trial, and what Optuna makes of nine combinations, of which three are that trial."""
    listed: Any = {key: CategoricalDistribution((1, 2, 3)) for key in ("factor", "other")}
    return Points(["scratch"], OptunaSearch(listed, metric="val_loss", mode="min", seed=0), trial_at)


def test_no_trial_is_given_twice(tmp_path: Path) -> None:
    given, restored = points(), points()
    assert given.suggest("0") == {"name": "scratch"}
    chosen: list[Any] = [given.suggest(str(number)) for number in range(1, 4)]
    given.on_trial_result("1", {"val_loss": 1.0, "training_iteration": 1})
    given.on_trial_complete("1", {"val_loss": 1.0})
    given.save(str(tmp_path / "points"))
    restored.restore(str(tmp_path / "points"))
    chosen += [restored.suggest(str(number)) for number in range(4, 7)]
    assert len({trial_at(point["values"]).name for point in chosen} - {"scratch"}) == 6
    assert restored.suggest("7") == Searcher.FINISHED


def test_there_is_a_heat_for_each_budget_and_its_first_rung_is_after_the_last_growth(budgets: Search) -> None:
    short, long = heats(budgets.corners, grace=0.1)
    assert long.budget == pytest.approx(2 * short.budget, rel=0.01)
    grown_at = max(trial.grown_at for trial in budgets.corners)  # bases are the same at every budget
    assert short.first_rung == pytest.approx(grown_at + 0.1 * short.budget)
    assert long.first_rung == pytest.approx(grown_at + 0.1 * long.budget)
    assert short.last_rung == short.budget


def test_different_decays_are_compared_before_any_begins() -> None:
    (heat,) = heats(search({"plan.phases.stacked.decay": {"grid": [0.1, 0.5]}}).corners, grace=0.1)
    assert heat.last_rung == pytest.approx((0.05 + 0.95 * 0.5) * heat.budget, rel=0.02)


def test_only_trials_of_one_budget_and_seed_are_held_against_each_other(budgets: Search) -> None:
    tune = Tune(asha(budgets))
    (short, _) = heats(budgets.corners, grace=0.1)
    flops = 0.9 * short.budget
    decayed = tune.add(name(10_000_000, 1_000_000))
    assert tune.goes_on(decayed, flops, 3.0)
    assert tune.goes_on(tune.add(name(20_000_000, 1_000_000)), flops, 3.5)  # has yet to decay
    assert tune.goes_on(tune.add(name(10_000_000, 1_000_000, seed=1)), flops, 3.5)
    control = next(trial.name for trial in budgets.fixed if trial.control and trial.values["seed"] == 0)
    assert tune.goes_on(tune.add(control), flops, 9.0)
    worse = tune.add(name(10_000_000, 2_000_000))
    assert tune.goes_on(worse, 0.9 * short.first_rung, 9.0)
    assert not tune.goes_on(worse, flops, 3.5)


def test_at_a_rung_counts_the_loss_there(budgets: Search) -> None:
    (short, _) = heats(budgets.corners, grace=0.1)
    rung = short.first_rung
    tune = Tune(asha(budgets))
    first = tune.add(name(10_000_000, 1_000_000))
    assert tune.goes_on(first, 0.9 * rung, 5.0)
    assert tune.goes_on(first, 1.1 * rung, 4.0)  # 4.5 at the rung
    ahead = tune.add(name(10_000_000, 2_000_000))
    assert tune.goes_on(ahead, 0.99 * rung, 4.45)
    assert tune.goes_on(ahead, 1.19 * rung, 4.25)  # 4.44 at the rung, though no evaluation was below 4.0
    assert tune.goes_on(first, 1.1 * rung, 9.0)  # told again by a process that goes on: that is decided


def test_across_a_growth_nothing_is_interpolated(budgets: Search) -> None:
    (short, _) = heats(budgets.corners, grace=0.1)
    tune = Tune(asha(budgets))
    first = tune.add(name(10_000_000, 1_000_000))
    assert tune.goes_on(first, 1.1 * short.first_rung, 4.0)
    other = tune.add(name(10_000_000, 2_000_000))
    assert tune.goes_on(other, 0.9 * short.first_rung, 3.0, phase="base")
    assert not tune.goes_on(other, 1.1 * short.first_rung, 4.1)


def test_half_goes_on_and_who_has_ended_still_counts(budgets: Search) -> None:
    (heat,) = (Heat(1.0, 0.2, 1.0),)
    found = SimpleNamespace(flops=1.0, control=False, run=SimpleNamespace(seed=0))
    ended = [{"flops": 0.3, "val_loss": 2.0, "phase": "stacked", "ends": False}]
    scheduler = AshaOnFlops(lambda point: found, lambda trial: ended, (heat,), reduction_factor=2)  # type: ignore
    tune = Tune(scheduler)
    tune.add("ended", finished=True)
    losses = [3.0, 1.0, 1.5, 2.5, 1.2]
    trials = [tune.add(str(loss)) for loss in losses]
    assert [tune.goes_on(trial, 0.3, loss) for trial, loss in zip(trials, losses, strict=True)] == [
        False,  # behind the one before
        True,
        True,  # second of four
        False,
        True,
    ]
    assert tune.goes_on(trials[2], 0.5, 1.0)  # the second rung has nobody yet
    assert tune.goes_on(trials[1], 1.0, 9.0, ends=True)


def test_a_budget_that_was_not_foreseen_is_left_alone(budgets: Search) -> None:
    longest = max(trial.flops for trial in budgets.corners)
    others = tuple(Heat(2 * longest * factor, longest, 2 * longest * factor) for factor in (1, 2))
    scheduler = AshaOnFlops(budgets.trial_of, lambda trial: [], others, reduction_factor=2)
    tune = Tune(scheduler)
    for base, loss in ((1_000_000, 1.0), (2_000_000, 9.0)):
        assert tune.goes_on(tune.add(name(20_000_000, base)), longest, loss)
