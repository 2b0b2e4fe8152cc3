"""Spaces: the trials that they give, and what is wrong with them, told before any trial starts."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from raygrow.config import build
from raygrow.space import SpaceConfig
from raygrow.train.shared import segments
from raygrow.trials import Search, Trial, describe
from tests.composed import composed

SHARE = "plan.phases.base.share"
FACTOR = "plan.phases.stacked.growth.factor"


composed_once = cache(composed)


def search(space: dict[str, Any], *overrides: str) -> Search:
    tree = composed_once("plan=gstack", *overrides)
    return Search(tree, build(SpaceConfig, space, "space"))


def names(space: dict[str, Any]) -> list[str]:
    return [trial.name for trial in search(space).fixed]


@pytest.mark.parametrize("name", ["growth_timing", "growth_factor", "growth_schedule", "growth_budget", "quickstart"])
def test_shipped_spaces_can_be_trained(name: str) -> None:
    found = shipped(name)
    assert any(trial.control for trial in found.fixed)
    for trial in found.corners:
        plan = trial.run.plan
        assert plan.flops or plan.tokens
        budget = plan.flops or (plan.tokens or 0) * trial.phases[-1].flops_per_token
        assert trial.flops == pytest.approx(budget, rel=0.02)


def shipped(name: str) -> Search:
    tree = composed(f"space={name}", name="tune")
    return Search(tree, build(SpaceConfig, tree.pop("space"), "space"))


def test_budgets_share_their_bases_and_their_trunks() -> None:
    found = shipped("growth_budget")
    parts: dict[Any, dict[float, tuple[Any, ...]]] = {}
    for trial in found.fixed:
        if not trial.formula:
            values = {key: value for key, value in trial.values.items() if key != "plan.tokens"}
            parts.setdefault(str(values), {})[trial.values["plan.tokens"]] = segments_of(trial)
    assert len(parts) == 2 * (3 * 2 + 1)
    shared = alone = 0.0
    for budgets in parts.values():
        assert len(budgets) == 3
        *before, last = zip(*budgets.values(), strict=True)
        for segment in before:
            assert len({part.key for part in segment}) == 1  # bases and trunks
        assert len({part.key for part in last}) == 3  # decays
        shared += sum(part.flops for part in last) + sum(max(part.flops for part in same) for same in before)
        alone += sum(part.flops for cut in budgets.values() for part in cut)
    assert shared < 0.58 * alone
    told = describe(found)
    unshared = {
        name: float(line.split("FLOPs, ")[1].split()[0])
        for line in told.splitlines()
        if "not shared" in line
        for name in [line.split()[0]]
    }
    for budget in (14, 20):
        assert unshared[f"plan.tokens-{budget}000000_base.tokens-1000000_factor-4_seed-1"] < 4e14


def segments_of(trial: Trial) -> tuple[Any, ...]:
    """As though its data were prepared."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").touch()
        return segments(trial.phases, trial.run.train, data=Path(folder), seed=trial.run.seed)


def test_a_phase_and_a_plan_have_one_budget() -> None:
    space = {"plan.flops": {"grid": [1e15]}, "plan.phases.base.tokens": {"grid": [1e6]}}
    control, trial = search({"space": space}).fixed
    assert (trial.run.plan.tokens, trial.run.plan.flops) == (None, 1e15)
    assert (trial.run.plan.phases["base"].tokens, trial.run.plan.phases["base"].share) == (1e6, None)
    assert trial.flops == pytest.approx(1e15, rel=0.01)
    assert control.flops == pytest.approx(1e15, rel=0.01)
    with pytest.raises(ValueError, match="sets share and tokens"):
        search({"space": {SHARE: {"grid": [0.1]}, "plan.phases.base.tokens": {"grid": [1e6]}}})


def test_a_grid_gives_every_combination_and_the_control_first() -> None:
    space = {"space": {SHARE: {"grid": [0.05, 0.1]}, FACTOR: {"grid": [2, 4]}}}
    assert names(space) == [
        "scratch",
        "share-0.05_factor-2",
        "share-0.05_factor-4",
        "share-0.1_factor-2",
        "share-0.1_factor-4",
    ]


def test_there_is_one_control_for_every_value_outside_of_the_phases() -> None:
    space = {"space": {SHARE: {"grid": [0.05]}, "seed": {"grid": [0, 1]}}}
    found = search(space).fixed
    assert [trial.name for trial in found] == [
        "scratch_seed-0",
        "scratch_seed-1",
        "share-0.05_seed-0",
        "share-0.05_seed-1",
    ]
    assert [trial.run.seed for trial in found] == [0, 1, 0, 1]


def test_growth_by_1_is_the_control() -> None:
    found = search({"space": {FACTOR: {"grid": [1, 2]}}, "control": False}).fixed
    assert [(trial.name, trial.control) for trial in found] == [("scratch", True), ("factor-2", False)]
    assert [phase.name for phase in found[0].phases] == ["scratch"]


def test_growth_by_1_is_one_control_whatever_its_phases_would_be() -> None:
    lr = "plan.phases.stacked.lr"
    found = search({"space": {FACTOR: {"grid": [1, 2]}, lr: {"grid": [1e-3, 4e-3]}}})
    control, *grown = found.fixed
    assert [trial.name for trial in grown] == ["factor-2_lr-0.001", "factor-2_lr-0.004"]
    assert found.trial({FACTOR: 1, lr: 4e-3}) == found.trial({FACTOR: 1, lr: 1e-3, SHARE: 0.3}) == control
    assert control.phases[0].lr == found.run.train.optimizer.lr


def test_growth_by_1_before_another_growth_is_no_control() -> None:
    again = ("stacked.share=0.2", "again.growth.operator=gstack", "again.growth.factor=2")
    words = [f"++plan.phases.{setting}" for setting in again]
    found = search({"space": {FACTOR: {"grid": [1, 2]}}, "control": False}, *words)
    assert [(trial.name, trial.control) for trial in found.fixed] == [("factor-1", False), ("factor-2", False)]


def test_the_formula_is_clamped_and_costs_the_same() -> None:
    scratch, formula, _ = search({"space": {SHARE: {"grid": [0.1]}}, "formula": True}).fixed
    assert formula.formula
    assert formula.values[SHARE] == pytest.approx(0.05, rel=0.05)
    assert formula.flops == pytest.approx(scratch.flops, rel=0.01)


def test_ranges_are_for_optuna_and_their_ends_are_tried_out() -> None:
    space = {"search": "optuna", "samples": 7, "space": {SHARE: {"uniform": [0.02, 0.1]}, FACTOR: {"choice": [2, 4]}}}
    found = search(space)
    assert found.samples == 7
    assert [trial.name for trial in found.fixed] == ["scratch"]
    assert {trial.name for trial in found.corners[1:]} == {
        f"share-{share}_factor-{factor}" for share in (0.02, 0.1) for factor in (2, 4)
    }


def test_of_lists_no_more_is_chosen_than_there_is() -> None:
    space = {SHARE: {"choice": [0.05, 0.1]}, FACTOR: {"choice": [1, 2, 4]}}
    assert search({"search": "optuna", "space": space}).samples == 4  # and the control
    assert search({"search": "optuna", "samples": 3, "space": space}).samples == 3


def test_a_trial_differs_from_the_run_by_its_values_alone() -> None:
    found = search({"space": {SHARE: {"grid": [0.1]}}})
    trial = found.fixed[-1]
    assert trial.run.plan.phases["base"].share == 0.1
    assert trial.run.plan.phases["stacked"] == found.run.plan.phases["stacked"]
    assert trial.run.train == found.run.train


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"plan.phases.base.shar": {"grid": [0.1]}}, "plan.phases.base.shar: there is no such key. Did you mean"),
        ({"plan.phases.bass.share": {"grid": [0.1]}}, "the plan has no phase 'bass', only base, stacked"),
        ({"optimizer.lr": {"grid": [0.1]}}, "optimizer: there is no such key"),
        ({"train.optimizer.lr.high": {"grid": [1]}}, "has no keys below it"),
        ({"model.d_model": {"grid": [192]}}, "all trials of a search have the same model and data"),
        ({FACTOR: {"grid": [2, 3]}}, "growth factor=3 does not divide the target's 8 blocks"),
        ({SHARE: {"grid": [0.1, 1.5]}}, "plan.phases.base.share=1.5"),
        ({SHARE: {"grid": [0.1, 1.0]}}, "plan.phases.stacked: its budget is less than one step"),
        ({"plan.phases.base.tokens": {"grid": [1e12]}, SHARE: {"grid": [None]}}, "is used up by the phases before it"),
        ({SHARE: {"uniform": [0.1, 0.2]}}, "set search: optuna"),
        ({SHARE: {"gird": [0.1, 0.2]}}, "must be exactly one of grid, choice"),
        ({SHARE: 0.1}, "must be exactly one of grid, choice"),
        ({SHARE: {"grid": 0.1}}, "must be exactly one of grid, choice"),
        ({SHARE: {"grid": []}}, "the list is empty"),
        ({}, "name at least one key"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(space: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=r"space|plan") as error:
        search({"space": space})
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"uniform": [0.2, 0.1]}, "uniform takes a lower and a higher number"),
        ({"loguniform": [0, 0.1]}, "above 0"),
        ({"quniform": [0.1, 0.2]}, "quniform takes 3 numbers"),
        ({"uniform": [0.5, 1.5]}, "plan.phases.base.share=1.5"),
    ],
)
def test_what_is_wrong_with_a_range_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="space") as error:
        search({"search": "optuna", "space": {SHARE: values}})
    assert told in str(error.value)


def test_budgets_are_listed() -> None:
    space = {"search": "optuna", "space": {"plan.tokens": {"uniform": [1e6, 2e6]}}}
    with pytest.raises(ValueError, match=r"space\.plan\.tokens: .* list the budgets: plan\.tokens: \{choice"):
        search(space)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("workers.num=2", "workers.num=2: a trial of a search trains in a single process"),
        ("control=true", "up to space.control"),
        ("storage_path=s3://bucket/runs", "a folder that every node sees"),
        ("++plan.phases.base.save_end=small", "a search saves no models"),
    ],
)
def test_runs_that_cannot_be_trials(setting: str, told: str) -> None:
    with pytest.raises(ValueError, match="search") as error:
        search({"space": {SHARE: {"grid": [0.1]}}}, setting)
    assert told in str(error.value)


def test_the_dry_run_tells_what_sharing_saves() -> None:
    told = describe(search({"space": {"plan.phases.stacked.decay": {"grid": [0.1, 0.2, 0.4]}}, "control": False}))
    assert "3 trials" in told
    # three whole runs against one trunk, its base, and three tails
    saved = int(told.split("saves ")[1].split("%")[0])
    assert saved == pytest.approx(100 * (1 - (1 - 0.4 * 0.95 + 0.95 * 0.7 + 0.95 * 0.2) / 3), abs=12)
