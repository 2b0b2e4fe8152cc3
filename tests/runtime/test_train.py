"""One real run on one worker, then two, from a model folder through a growth to the report, with its control."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raygrow.config import RunConfig, from_yaml
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.runtime.history import History
from raygrow.runtime.run_folder import RunFolder
from raygrow.runtime.train import train
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import PhaseConfig, PlanConfig
from raygrow.weights.folder import load_model, write_folder
from tests.runtime.driver import history

pytestmark = pytest.mark.ray

KEYS = {"phase", "step", "tokens", "flops", "loss", "grad_norm", "lr"}
KEYS |= {"tokens_per_second", "mfu", "memory_bytes", "seconds"}
SCORES = {"val_loss", "val_bits_per_byte"}


@pytest.fixture(scope="module")
def run(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The tiny run, whose base starts from a model folder, named relative to where the user is."""
    here = tmp_path_factory.mktemp("here")
    config = replace(tiny.model, blocks_per_stack=2)
    model = Rack(config)
    init_weights(model, config, seed=1)
    write_folder(here / "small", config, model.state_dict().items())
    stacked = replace(tiny.plan.phases["stacked"], steps=10, save_start="grown", save_end="stacked_final")
    phases = {
        "base": PhaseConfig(init="small", steps=10, workers=1, save_start="begun", save_end="base_final"),
        "stacked": stacked,
    }
    return replace(tiny, name="whole", storage_path=str(here / "runs"), plan=PlanConfig(phases=phases), control=True)


@pytest.fixture(scope="module")
def folder(ray: None, run: RunConfig) -> Path:
    """The finished run's folder."""
    folder = Path(run.storage_path) / run.name
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parents[1])
        assert train(run) == 0
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_history(folder: Path) -> None:
    lines = history(folder)
    assert [(line["phase"], line["step"]) for line in lines] == [(p, s) for p in ("base", "stacked") for s in (5, 10)]
    assert all(set(line) == KEYS | (SCORES if line["step"] == 10 else set()) for line in lines)
    assert [line["tokens"] for line in lines] == [2560, 5120, 7680, 10240]
    assert lines == sorted(lines, key=lambda line: (line["flops"], line["seconds"]))
    assert lines[-1]["val_loss"] < lines[0]["loss"]


def test_the_growth_is_on_record(folder: Path) -> None:
    (file,) = folder.glob("growth/*")
    assert file.name == "stacked.json"
    verification = read(file)
    assert verification["passed"]
    assert verification["operator"] == {"operator": "gstack", "factor": 2}
    assert verification["parameters"] == verification["predicted_parameters"]


def test_the_model_opens(folder: Path, run: RunConfig) -> None:
    model = load_model(folder / "model")
    assert model.config.regrouped(1) == run.model.regrouped(1)
    assert (folder / "model/tokenizer.json").exists()


def test_models_are_saved_as_the_plan_asks(folder: Path) -> None:
    assert {path.name for path in (folder / "models").iterdir()} == {
        *("begun", "base_final", "grown", "stacked_final"),
        "training_history.jsonl",
    }
    checkpoints = {"base_final": "base/step-00000010", "grown": "stacked/step-00000000"}
    for name, checkpoint in checkpoints.items():
        expected = CheckpointTensors(folder / "phases" / checkpoint, "model.")
        for parameter, tensor in load_model(folder / "models" / name).state_dict().items():
            assert torch.equal(tensor, expected[parameter]), (name, parameter)
    for one, other in (("models/begun", "../../small"), ("models/stacked_final", "model")):
        states = [load_model(folder / path).state_dict() for path in (one, other)]
        assert all(torch.equal(tensor, states[1][parameter]) for parameter, tensor in states[0].items())
    assert (folder / "models/grown/tokenizer.json").exists()
    assert (folder / "models/training_history.jsonl").read_text() == (folder / "history.jsonl").read_text()


def test_what_else_is_there(folder: Path, run: RunConfig) -> None:
    assert from_yaml((folder / "run.yaml").read_text()) == run
    assert "<html" in (folder / "report.html").read_text()
    assert list(folder.glob("tensorboard/events*"))
    assert all((step / "DONE").exists() for step in folder.glob("phases/*/step-*"))
    summary = read(folder / "summary.json")
    assert summary["status"] == "finished"
    assert [(phase["name"], phase["n_blocks"], phase["steps"]) for phase in summary["phases"]] == [
        ("base", 2, 10),
        ("stacked", 4, 10),
    ]
    assert summary["val_loss"] == history(folder)[-1]["val_loss"]


def test_the_control_costs_as_much(folder: Path) -> None:
    control = read(folder.with_name("whole-scratch") / "summary.json")
    step_flops = control["flops"] / control["phases"][0]["steps"]
    assert control["phases"][0]["n_blocks"] == 4
    assert control["flops"] == pytest.approx(read(folder / "summary.json")["flops"], abs=step_flops)


def test_a_finished_run_says_so(
    folder: Path, run: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parents[1])
    before = (folder / "history.jsonl").stat().st_mtime_ns
    assert train(run) == 0
    assert "whole is finished" in capsys.readouterr().out
    assert (folder / "history.jsonl").stat().st_mtime_ns == before


def test_a_wish_that_comes_at_the_very_end_is_heard(
    folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(RunFolder, "is_finished", lambda self: signal.raise_signal(signal.SIGTERM) is None)
    assert train(replace(run, control=False)) == 143


def test_data_prepared_anew_is_refused(folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(RunFolder, "is_finished", lambda self: False)
    monkeypatch.setattr("raygrow.runtime.run_folder.fingerprint", lambda path: "another")
    with pytest.raises(ValueError, match=r"a run on other data than .* holds now"):
        train(run)
    assert (folder / "summary.json").exists()


def test_a_growth_to_no_number_is_told(tmp_path: Path) -> None:
    recorder = History.__ray_metadata__.modified_class(RunFolder.of(str(tmp_path), "run"))  # what the actor runs
    recorder.save_verification("stacked", {"loss_before": 2.5, "loss_after": None, "passed": False})
    assert recorder.news()[1] == ["stacked: grown, loss 2.5000 -> -, verification FAILED"]


def test_a_save_that_a_crash_prevented_is_made_up_for(
    folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parents[1])
    kept = (folder / "models/stacked_final/config.json").stat().st_mtime_ns
    (folder / "summary.json").unlink()
    for name in ("base_final", "grown"):
        shutil.rmtree(folder / "models" / name)
    assert train(run) == 0
    test_models_are_saved_as_the_plan_asks(folder)
    assert (folder / "models/stacked_final/config.json").stat().st_mtime_ns == kept


def test_another_configuration_under_the_same_name(
    folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parents[1])
    with pytest.raises(ValueError, match="another configuration: seed was 0 and is now 1"):
        train(replace(run, seed=1))
