"""Searches on Ray Tune: to their end, killed and taken up again, stopped early; what no cluster has room for."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.util.state import list_actors, list_placement_groups

from raygrow.config import RunConfig, WorkersConfig
from tests.runtime.driver import driver, losses, settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray")]

SHARE = "plan.phases.base.share"
FACTOR = "plan.phases.stacked.growth.factor"
GRID = {"space": {SHARE: {"grid": [0.1, 0.2, 0.3]}, FACTOR: {"grid": [2, 4]}}, "control": True, "asha": None}


@pytest.fixture
def words(tiny: RunConfig, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a search over a run of seconds."""
    run = replace(
        tiny,
        storage_path=str(tmp_path / "runs"),
        workers=WorkersConfig(),
        train=replace(tiny.train, evaluate_every=10),
        plan=replace(tiny.plan, tokens=30_000),
    )

    def made(space: dict[str, Any], name: str) -> list[str]:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(space))
        steps = [f"plan.phases.{phase}.steps=null" for phase in ("base", "stacked")]
        own = [word for word in settings(replace(run, name=name)) if ".steps=" not in word]
        return ["tune", f"space={file}", *own, *steps, "plan.phases.base.share=0.2"]

    return made


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def left_behind() -> list[Any]:
    """Trials' actors and reservations that are still there."""
    address = ray.get_runtime_context().gcs_address
    alive = list_actors(address, filters=[("state", "=", "ALIVE")])
    actors = [actor for actor in alive if actor.class_name in CLASSES]
    groups = [group for group in list_placement_groups(address) if group.state in ("CREATED", "PENDING")]
    return [*actors, *groups]


CLASSES = ("ImplicitFunc", "Trunks")


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 20
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_killed_search_goes_on_and_repeats_nothing(words: Callable[..., list[str]], tmp_path: Path) -> None:
    with driver(tmp_path, *words(GRID, "whole")) as search:
        assert search.wait() == 0, search.said()
    whole = tmp_path / "runs/whole"
    rows = results(whole)
    assert len(rows) == 7
    assert {row["status"] for row in rows.values()} == {"finished"}
    assert [row["control"] for row in rows.values()].count(True) == 1
    assert (whole / "report.html").exists()

    killed = tmp_path / "runs/killed"

    def finished() -> dict[str, str]:
        """Histories of the trials that have ended. They hold times, so one that ran again would have another."""
        ended = [file.parent for file in killed.glob("trials/*/summary.json") if "finished" in file.read_text()]
        return {trial.name: (trial / "history.jsonl").read_text() for trial in ended}

    with driver(tmp_path, *words(GRID, "killed")) as search:
        before = search.until(lambda: len(finished()) >= 2 and finished())
        os.killpg(search.process.pid, signal.SIGKILL)
        search.process.wait()
    states = {file: file.stat().st_mtime for file in killed.glob("states/*/step-*/history.jsonl")}
    with driver(tmp_path, *words(GRID, "killed")) as search:
        assert search.wait() == 0, search.said()
    assert before.items() <= finished().items()
    assert {file: file.stat().st_mtime for file in states if file.exists()}.items() <= states.items()
    assert len(results(killed)) == 7
    for name in rows:
        assert losses(killed / "trials" / name) == losses(whole / "trials" / name)
    assert_nothing_left()


def test_stopping_early_leaves_nothing_behind(words: Callable[..., list[str]], tmp_path: Path) -> None:
    grid = {"plan.phases.stacked.lr": {"grid": [3e-3, 1e-6, 1e-7, 1e-8]}}
    space = {"space": grid, "asha": {"grace": 0.1, "reduction_factor": 2}}
    with driver(tmp_path, *words(space, "early")) as search:
        assert search.wait() == 0, search.said()
    rows = results(tmp_path / "runs/early")
    assert rows["scratch"]["status"] == "finished"
    stopped = [row for row in rows.values() if row["status"] == "stopped"]
    assert stopped
    assert all(row["flops"] < rows["scratch"]["flops"] for row in stopped)
    assert_nothing_left()


def test_sigterm_stops_a_search_that_can_go_on(words: Callable[..., list[str]], tmp_path: Path) -> None:
    space = {"search": "optuna", "samples": 3, "space": {SHARE: {"uniform": [0.1, 0.3]}}, "asha": None}
    folder = tmp_path / "runs/told"
    with driver(tmp_path, *words(space, "told")) as search:
        search.until(lambda: list(folder.glob("trials/*/summary.json")))
        search.process.send_signal(signal.SIGTERM)
        assert search.wait() == 143, search.said()
        assert "goes on from what is there" in search.said()
    with driver(tmp_path, *words(space, "told")) as search:
        assert search.wait() == 0, search.said()
    assert [row["status"] for row in results(folder).values()] == ["finished"] * 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trial": {"cpus": 99}}, "a trial asks for 99 CPU and 0 GPU, which no node has"),
        ({"space": {FACTOR: {"grid": [3]}}}, "growth factor=3 does not divide"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(
    change: dict[str, Any], told: str, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    with driver(tmp_path, *words(GRID | change, "never")) as search:
        assert search.wait() == 2
        assert told in search.said()
    assert not (tmp_path / "runs").exists()
