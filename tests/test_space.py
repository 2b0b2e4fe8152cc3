"""Spaces: the trials that they give, and what is wrong with them, told before any trial starts."""

from functools import cache
from typing import Any

import pytest

from raygrow.config import build
from raygrow.space import SpaceConfig
from raygrow.trials import Search, describe
from tests.composed import composed

SHARE = "plan.phases.base.share"
FACTOR = "plan.phases.stacked.growth.factor"


composed_once = cache(composed)


def search(space: dict[str, Any], *overrides: str) -> Search:
    tree = composed_once("plan=gstack", *overrides)
    return Search(tree, build(SpaceConfig, space, "space"))


def names(space: dict[str, Any]) -> list[str]:
    return [trial.name for trial in search(space).fixed]


@pytest.mark.parametrize("name", ["growth_timing", "growth_factor", "growth_schedule", "quickstart"])
def test_shipped_spaces_can_be_trained(name: str) -> None:
    tree = composed(f"space={name}", name="tune")
    space = build(SpaceConfig, tree.pop("space"), "space")
    found = Search(tree, space)
    assert any(trial.control for trial in found.fixed)
    assert all(abs(trial.flops / found.flops - 1) < 0.02 for trial in found.corners)


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
