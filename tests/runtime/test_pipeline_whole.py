"""The pipeline for real, at the smallest size: killed in every stage, stopped, and gone on with each time."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raygrow.report.pipeline import STAGES
from tests.runtime.conftest import ROOT
from tests.runtime.driver import Driver, driver, history
from tests.runtime.serving import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray")]

SETTINGS = [
    *("--config-name", "pipeline_quickstart", "name=way", "data=files"),
    *(f"data.files=['{ROOT}/raygrow/**/*.py']", "data.tokenizer.vocab_size=512", "data.validation_share=0.1"),
    *("model.d_model=32", "model.d_ff=64", "model.max_seq_len=64", "model.blocks_per_stack=2", "model.n_experts=2"),
    *("plan.tokens=6e4", "train.seq_len=64", "train.checkpoint_every=10", "train.evaluate_every=10"),
    *("evaluate.sequences=8", "sparsify.sparsity=0.4", "sparsify.sequences=4", "sparsify.search_sequences=2"),
    *("sparsify.evaluate_sequences=4", "serve.tokens=8"),
    *("serve.deployment_config.ray_actor_options={num_cpus: 0.5}", "serve.ingress.num_cpus=0.5"),
]


def record(root: Path, stage: str) -> dict[str, Any]:
    file = root / stage / "stage.json"
    return json.loads(file.read_text()) if file.exists() else {}


def begun(root: Path, stage: str) -> Callable[[], bool]:
    return lambda: bool(record(root, stage))


def killed(folder: Path, words: list[str], when: Callable[[], Any]) -> None:
    with driver(folder, "pipeline", *words) as command:
        command.until(when)
        command.process.kill()
        assert command.process.wait() == -signal.SIGKILL


def run(folder: Path, words: list[str]) -> Driver:
    with driver(folder, "pipeline", *words) as command:
        assert command.wait() == 0
    return command


def test_killed_in_every_stage_and_stopped_it_comes_to_its_end(tmp_path: Path) -> None:
    words = [*SETTINGS, f"serve.port={free_port()}"]
    root = tmp_path / "runs/way"
    killed(tmp_path, words, begun(root, "prepare"))
    killed(tmp_path, words, lambda: len(history(root / "train")) >= 3)
    with driver(tmp_path, "pipeline", *words) as command:
        command.until((root / "train/growth/experts.json").exists)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 143
        assert "way was stopped. The same command goes on from what is there" in command.said()
    assert "next is train" in (root / "report.html").read_text()
    for stage in ("evaluate", "sparsify"):
        killed(tmp_path, words, begun(root, stage))
    killed(tmp_path, words, lambda: record(root, "serve").get("deployed"))
    before = {stage: record(root, stage) for stage in STAGES[:-1]}
    command = run(tmp_path, words)
    assert {stage: record(root, stage) for stage in STAGES[:-1]} == before
    assert [record(root, stage)["starts"] for stage in STAGES] == [2, 3, 2, 2, 2]
    assert record(root, "serve")["gave"]["same"]
    assert "stage 4 of 5, sparsify: finished before" in command.said()
    assert "<h1>From text to a served sparse model</h1>" in (root / "report.html").read_text()
    assert [(line["phase"], line["step"]) for line in history(root / "train")] == sorted(
        {(line["phase"], line["step"]) for line in history(root / "train")},
        key=lambda line: (("base", "stacked", "experts").index(line[0]), line[1]),
    )


def test_it_goes_on_serving_when_asked_to(tmp_path: Path) -> None:
    words = [*SETTINGS, f"serve.port={free_port()}", "serve.keep=true"]
    with driver(tmp_path, "pipeline", *words) as command:
        command.until(lambda: "report: " in command.said().partition("the server answers with the tokens")[2])
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 0
    assert record(tmp_path / "runs/way", "serve")["gave"]["same"]
