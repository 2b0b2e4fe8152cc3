"""What results.json says of trials, whatever Tune remembers of them. Needs no Ray that runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.tune.experiment import Trial as TuneTrial

from raygrow.config import build
from raygrow.report.search import is_search
from raygrow.runtime.trial import SearchFolder, _Trial
from raygrow.runtime.tune import _check_claim, _claim, _write_results
from raygrow.space import SpaceConfig
from raygrow.train.loop import Outcome
from raygrow.trials import Search
from tests.composed import composed

SPACE = {"space": {"plan.phases.base.share": {"grid": [0.1, 0.2, 0.3]}}}


@pytest.fixture
def search(tmp_path: Path) -> Search:
    """As though its data were prepared."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").touch()
    return Search(composed("plan=gstack", f"data.path={tmp_path / 'data'}"), build(SpaceConfig, SPACE, "space"))


def test_who_has_ended_is_read_from_the_trials_folders(search: Search, tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path / "search")
    outcomes = {"scratch": "finished", "share-0.1": "finished", "share-0.2": "failed", "share-0.3": "stopped"}
    for trial in search.fixed:
        folder.run(trial.name).write_summary(trial.phases, Outcome(outcomes[trial.name]))  # type: ignore[arg-type]

    def ended(*done: str, tried: int = 4, **more: bool) -> str:
        trials = [
            SimpleNamespace(
                config={"name": trial.name},
                status=TuneTrial.TERMINATED,
                last_result={"done": True} if trial.name in done else {},
            )
            for trial in search.fixed[:tried]
        ]
        grid = SimpleNamespace(_experiment_analysis=SimpleNamespace(trials=trials))
        return _write_results(search, folder, grid, **{"was_told_to_stop": True} | more)  # type: ignore[arg-type]

    assert ended() == ended(tried=3) == "stopped"
    assert not is_search(folder.path)
    assert ended("share-0.3") == "finished"
    assert {row["name"]: row["status"] for row in json.loads((folder.path / "results.json").read_text())} == outcomes
    assert ended(tried=3, was_told_to_stop=False) == "finished"  # a space may have no more


def test_a_search_that_goes_on_has_no_results(search: Search, tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path / "search")
    folder.path.mkdir()
    for name in ("results.json", "cost.json"):
        (folder.path / name).write_text("of the moment of a stop")
    _claim(search, folder)
    assert [file.name for file in folder.path.iterdir()] == ["search.yaml"]


def test_settings_that_have_come_since_a_search_began_are_at_their_defaults(search: Search, tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path / "search")
    _claim(search, folder)
    tree = yaml.safe_load(folder.settings.read_text())
    del tree["run"]["train"]["diverged_above"], tree["space"]["formula"]
    folder.settings.write_text(yaml.safe_dump(tree))
    _check_claim(search, folder)
    tree["run"]["train"]["gone_by_now"] = 1
    folder.settings.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"search\.yaml: run\.train\.gone_by_now: there is no such key"):
        _check_claim(search, folder)
    for damaged in ("run: [", "run: 1"):
        folder.settings.write_text(damaged)
        with pytest.raises(ValueError, match=r"search\.yaml"):
            _check_claim(search, folder)


@pytest.mark.parametrize(("key", "value"), [("concurrent", 2), ("max_failures", 0)])
def test_what_tune_keeps_of_a_search_cannot_change(key: str, value: int, search: Search, tmp_path: Path) -> None:
    folder = SearchFolder(tmp_path / "search")
    _claim(search, folder)
    trial = replace(search.space.trial, cpus=2, gpus=1)
    _check_claim(Search(search.tree, replace(search.space, trial=trial)), folder)
    with pytest.raises(ValueError, match=rf"space\.trial\.{key} was (None|3) and is now {value}"):
        _check_claim(Search(search.tree, replace(search.space, trial=replace(trial, **{key: value}))), folder)


def test_a_trial_leaves_the_folder_of_another_run_as_it_is(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, folder, told = search.fixed[0], SearchFolder(tmp_path / "search"), []
    folder.run(trial.name).claim(replace(trial.run, seed=7))
    monkeypatch.setattr("raygrow.runtime.trial.tune.report", told.append)
    _Trial(trial, folder, tmp_path / "data", None, device="cpu").train()  # type: ignore[arg-type]
    assert "holds a run of another configuration: seed was 7 and is now 0" in told[0]["failure"]
    assert folder.run(trial.name).names() == ["run.yaml"]
