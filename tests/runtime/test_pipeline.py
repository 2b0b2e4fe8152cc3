"""The pipeline at the smallest size: its stages, their order and their records, and what is refused before any begins.

Training and serving, which take processes of their own, are made up here; test_pipeline_whole.py has the real ones.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raygrow.config import RunConfig, to_tree
from raygrow.data.corpus import FilesCorpus
from raygrow.growth.experts import Experts
from raygrow.infer.config import EngineConfig
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.report.html import write_report
from raygrow.report.pipeline import STAGES, load_pipeline
from raygrow.report.pipeline_summary import summarize_pipeline
from raygrow.runtime import pipeline as job
from raygrow.runtime.pipeline_config import AnswerConfig, EvaluateConfig, PipelineConfig, as_tree, read_pipeline
from raygrow.runtime.stage_work import continue_text
from raygrow.sparsity.config import SparsifyConfig
from raygrow.train.config import PhaseConfig, PlanConfig
from raygrow.weights.folder import write_folder
from tests.composed import composed
from tests.report.conftest import GROWTH
from tests.runtime.conftest import ROOT

SPARSIFY = SparsifyConfig(sparsity=(0.25, 0.4), split="uniform", sequences=4, evaluate_sequences=4, device="cpu")


@pytest.fixture
def config(tiny: RunConfig, tmp_path: Path) -> PipelineConfig:
    """Two blocks that become experts, made sparse at two levels."""
    model = replace(tiny.model, d_model=16, d_ff=32, blocks_per_stack=2, n_experts=3, top_k=2, d_expert=32)
    phases = {
        "dense": PhaseConfig(steps=2),
        "experts": PhaseConfig(growth=Experts(n_experts=3, top_k=2), steps=2),
    }
    run = replace(tiny, name="way", storage_path=str(tmp_path / "runs"), model=model, plan=PlanConfig(phases=phases))
    return PipelineConfig(
        run=run, evaluate=EvaluateConfig(sequences=4), sparsify=SPARSIFY, serve=AnswerConfig(tokens=8)
    )


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training writes a fresh model, other processes are this one, the server is an engine here; says what was done."""
    done: list[str] = []

    def train(run: RunConfig) -> int:
        done.append("train")
        folder = Path(run.storage_path) / run.name
        model = Rack(run.model)
        init_weights(model, run.model, seed=run.seed)
        tokenizer = Path(run.data.path) / "tokenizer"
        write_folder(folder / "model", run.model, model.state_dict().items(), tokenizer_from=tokenizer)
        line = {"phase": "dense", "step": 2, "tokens": 1024, "flops": 1e6, "seconds": 1.0, "loss": 6.0, "lr": 1e-3}
        line |= {"tokens_per_second": 1e3, "val_loss": 5.9, "val_bits_per_byte": 3.0}
        lines = [line, line | {"phase": "experts", "tokens": 2048, "flops": 2e6, "seconds": 2.0, "val_loss": 5.8}]
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.yaml").write_text(json.dumps(to_tree(run)))
        (folder / "growth").mkdir()
        (folder / "growth/experts.json").write_text(json.dumps(GROWTH.to_json()))
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "flops": 2e6, "phases": []}))
        return 0

    def here(self: Any, function: Callable[..., Any], use_gpu: bool = False, **arguments: Any) -> Any:
        done.append(function.__name__)
        return function(**arguments, progress=lambda *_: None)

    def serve_models(served: Any, *, ready: Callable[[str], bool], **options: Any) -> int:
        done.append("serve")
        model = served.llm_configs[0]

        def ask(address: str, question: dict[str, Any], api_key: str | None) -> dict[str, Any]:
            arguments = question["prompt"], question["max_tokens"]
            folder, engine = model.model_loading_config.folder, model.engine_kwargs
            return {"choices": [continue_text(folder, engine, *arguments, progress=lambda *_: None)]}

        monkeypatch.setattr(job, "_ask", ask)
        ready("http://nowhere")
        return 0

    monkeypatch.setattr(job, "train", train)
    monkeypatch.setattr(job._Work, "_elsewhere", here)
    monkeypatch.setattr(job, "serve_models", serve_models)
    monkeypatch.setattr(job, "connect", lambda: None)
    monkeypatch.setattr(job, "has_gpu", lambda: False)
    monkeypatch.setattr(job, "write_report", lambda folders, out: out / "report.html")
    monkeypatch.setattr(job, "print_summary", lambda *_: None)
    monkeypatch.setattr(job.serve, "status", lambda: type("Status", (), {"applications": {}}))
    return done


EVERYTHING = ["train", "score", "make_sparse", "score", "continue_text", "serve"]


def record(config: PipelineConfig, stage: str) -> dict[str, Any]:
    return json.loads((config.root / stage / "stage.json").read_text())


def test_brackets_in_a_name_are_told_as_they_are(
    config: PipelineConfig, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    job.run_pipeline(replace(config, run=replace(config.run, name="way[red]")))
    assert "way[red]/report.html" in capsys.readouterr().out


def test_a_damaged_record_of_a_stage_is_named(config: PipelineConfig, made_up: list[str]) -> None:
    job.run_pipeline(config)
    file = config.root / "sparsify/stage.json"
    old = record(config, "sparsify")
    for settings in ({"sparsify": {"gone": 1}}, {"gone": {}}, None):
        file.write_text(json.dumps(old | {"settings": settings}))
        with pytest.raises(ValueError, match=r"sparsify/stage\.json"):
            job.run_pipeline(config)


def test_every_stage_is_done_once(
    config: PipelineConfig, made_up: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run_pipeline(config) == 0
    assert made_up == EVERYTHING
    assert job.run_pipeline(config) == 0
    assert made_up == EVERYTHING
    assert "stage 5 of 5, serve: finished before" in capsys.readouterr().out
    for stage in STAGES:
        assert record(config, stage)["starts"] == 1
    gave = record(config, "serve")["gave"]
    assert gave["same"]
    assert gave["answer"] == gave["offline"]
    assert gave["sparsity"] == 0.4
    assert {file.name for file in (config.root / "sparsify").glob("0*")} == {
        *("0.25-all.json", "0.25-decode.json", "0.4-all.json", "0.4-decode.json"),
    }
    for stage in ("train", "evaluate", "sparsify"):
        assert record(config, stage)["flops"] > 0


def test_the_report_says_it_all(config: PipelineConfig, made_up: list[str], tmp_path: Path) -> None:
    job.run_pipeline(config)
    page = write_report([config.root], config.root).read_text()
    assert "<h1>From text to a served sparse model</h1>" in page
    assert "What sparsity costs" in page
    for title in ("Stages", "Sparsity", "Serving", "Growth", "Growth checks", "Phases"):
        assert f"<h2>{title}</h2>" in page
    scores = [
        json.loads((config.root / f"{name}.json").read_text()) for name in ("evaluate/dense-all", "sparsify/0.4-all")
    ]
    for score in scores:
        assert f"<td>{score['perplexity']:.3f}</td>" in page
    assert f"<td>{scores[1]['perplexity'] / scores[0]['perplexity'] - 1:+.1%}</td>".replace("%", " %") in page
    assert (config.root / "pipeline.png").stat().st_size > 10_000
    assert write_report([config.root], tmp_path / "again").read_text().count("<svg") == page.count("<svg") == 5


def test_without_the_dense_models_evaluation_there_is_no_rise(
    config: PipelineConfig, made_up: list[str], tmp_path: Path
) -> None:
    job.run_pipeline(config)
    shutil.rmtree(config.root / "evaluate")
    page = write_report([config.root], tmp_path / "report").read_text()
    (table,) = re.findall("<h2>Sparsity</h2>.*?</section>", page, re.DOTALL)
    assert "<td>0.25</td>" in table
    assert "<th>rise</th>" not in table  # not that over the lowest level
    assert "What sparsity costs" not in page


def test_commands_of_the_report_can_be_copied(config: PipelineConfig, made_up: list[str], tmp_path: Path) -> None:
    run = replace(config.run, name="my way", storage_path=str(tmp_path / "all runs"))
    job.run_pipeline(replace(config, run=run))
    serve, evaluate = summarize_pipeline(load_pipeline(tmp_path / "all runs/my way")).commands
    model = str((tmp_path / "all runs/my way/sparsify/model").resolve())
    assert shlex.split(serve) == ["raygrow", "serve", model, "--name", "my way", "--sparsity", "0.4"]
    assert shlex.split(evaluate)[2] == model


@pytest.mark.parametrize("stage", ["score", "make_sparse", "continue_text", "serve"])
def test_it_goes_on_with_the_stage_that_it_was_killed_in(
    stage: str, config: PipelineConfig, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*args: Any, **options: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "serve_models" if stage == "serve" else stage, killed)
        with pytest.raises(Killed):
            job.run_pipeline(config)
    assert job.run_pipeline(config) == 0
    again = ["continue_text"] if stage == "serve" else []  # the answer to compare with is not kept
    assert [name for name in made_up if name != "killed"] == [*EVERYTHING[:-1], *again, "serve"]
    assert record(config, "serve")["gave"]["same"]
    assert [record(config, name)["starts"] for name in STAGES].count(2) == 1


def test_half_written_files_of_a_killed_process_go(config: PipelineConfig, made_up: list[str]) -> None:
    job.run_pipeline(config)
    (config.root / "serve/stage.json").unlink()
    unfinished = record(config, "sparsify") | {"finished": None}
    (config.root / "sparsify/stage.json").write_text(json.dumps(unfinished))
    (config.root / "sparsify/.model.tmp-1").mkdir()
    assert job.run_pipeline(config) == 0
    assert not list(config.root.glob("*/.*"))
    assert made_up[len(EVERYTHING) :] == ["make_sparse", "score", "continue_text", "serve"]


def test_another_answer_than_the_engine_gives_is_told(
    config: PipelineConfig, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"text": "no", "logprobs": {"tokens": ["no"]}, "finish_reason": "stop"}
    with monkeypatch.context() as patch:
        patch.setattr(job, "continue_text", lambda **_: wrong)
        with pytest.raises(ValueError, match="and the engine by itself with 'no': they should be the same"):
            job.run_pipeline(config)
    assert (
        "<h1>The server answers otherwise than the engine</h1>" in write_report([config.root], config.root).read_text()
    )
    assert job.run_pipeline(config) == 0
    assert record(config, "serve")["gave"]["same"]


def test_a_changed_setting_of_a_finished_stage_is_refused(config: PipelineConfig, made_up: list[str]) -> None:
    job.run_pipeline(config)
    changes = {
        "plan.phases.dense.steps was 2 and is now 3, but the stage train is finished": replace(
            config, run=replace(config.run, plan=with_steps(config.run.plan, 3))
        ),
        "sparsify.split was 'uniform' and is now 'ratio'": replace(config, sparsify=replace(SPARSIFY, split="ratio")),
        "evaluate.sequences was 4 and is now 5": replace(config, evaluate=EvaluateConfig(sequences=5)),
        "serve.tokens was 8 and is now 9": replace(config, serve=AnswerConfig(tokens=9)),
    }
    for message, changed in changes.items():
        with pytest.raises(ValueError, match=message):
            job.run_pipeline(changed)
    assert made_up == EVERYTHING
    harmless = replace(config, serve=replace(config.serve, port=9000), run=replace(config.run, dry_run=True))
    assert job.run_pipeline(harmless) == 0


def test_a_setting_that_has_come_since_has_its_default(config: PipelineConfig, made_up: list[str]) -> None:
    job.run_pipeline(config)
    for stage, part in (("sparsify", "sparsify"), ("train", "train"), ("serve", "serve")):
        old = record(config, stage)
        old["settings"][part].pop({"sparsify": "rotation", "train": "compile", "serve": "tokens"}[stage])
        (config.root / stage / "stage.json").write_text(json.dumps(old))
    assert job.run_pipeline(replace(config, serve=replace(config.serve, tokens=AnswerConfig().tokens))) == 0
    assert made_up == EVERYTHING
    with pytest.raises(ValueError, match=r"sparsify.rotation was 'auto' and is now 'none'"):
        job.run_pipeline(replace(config, sparsify=replace(SPARSIFY, rotation="none")))


def test_stages_that_are_removed_are_done_again(config: PipelineConfig, made_up: list[str]) -> None:
    job.run_pipeline(config)
    changed = replace(config, sparsify=replace(SPARSIFY, method="topk", search_sequences=None))
    shutil.rmtree(config.root / "sparsify")
    with pytest.raises(ValueError, match=r"serve was made after a stage sparsify that is gone: remove it too"):
        job.run_pipeline(changed)
    shutil.rmtree(config.root / "serve")
    assert job.run_pipeline(changed) == 0
    assert made_up[len(EVERYTHING) :] == EVERYTHING[2:]


def test_a_stage_that_was_begun_with_other_settings_begins_anew(
    config: PipelineConfig, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job, "serve_models", lambda *_, **__: (_ for _ in ()).throw(ValueError("no port")))
        with pytest.raises(ValueError, match="no port"):
            job.run_pipeline(config)
    assert job.run_pipeline(replace(config, serve=replace(config.serve, prompt="class "))) == 0
    assert record(config, "serve")["gave"]["prompt"] == "class "
    assert record(config, "serve")["starts"] == 1


def with_steps(plan: PlanConfig, steps: int) -> PlanConfig:
    return replace(plan, phases=plan.phases | {"dense": PhaseConfig(steps=steps)})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sparsify", {"sparsity": (0.4, 0.99)}, "sparsify: sparsity=0.99: more than can be dropped"),
        ("sparsify", {"sparsity": (0.4, 1.0)}, "sparsity=1: must be at least 0 and below 1"),
        ("sparsify", {"seq_len": 65}, "sparsify: seq_len=65: this model takes 2 to 64 tokens"),
        (
            "sparsify",
            {"sequences": 1, "seq_len": 8, "search_sequences": None},
            "sparsify: sequences=1, seq_len=8: fewer tokens than d_model=16",
        ),
        ("serve", {"engine_kwargs": EngineConfig(sparsity=0.3)}, "sparsity=0.3: the model is made for .*0.25, 0.4"),
        (
            "serve",
            {"engine_kwargs": EngineConfig(max_model_len=65)},
            "engine_kwargs.max_model_len=65: this model takes 64",
        ),
        ("serve", {"tokens": 64}, "serve.tokens=64: the engine takes 64 tokens"),
        (
            "sparsify",
            {"method": "relu", "sparsity": None, "split": None},
            "hidden units of mlp=swiglu are never exactly zero",
        ),
        ("run", {"storage_path": "s3://bucket/runs"}, "storage_path=s3://bucket/runs: .* as a folder"),
        ("run", {"plan": PlanConfig(phases={})}, "plan.phases is empty"),
    ],
)
def test_settings_that_cannot_be_are_told_at_once(
    part: str, change: dict[str, Any], message: str, config: PipelineConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **{part: replace(getattr(config, part), **change)})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"norm": "layernorm"}, "sparsify: the finished model: rotation=global: only rmsnorm is .* set rotation=none"),
        ({"vocab_size": 400}, "data.tokenizer.vocab_size=512 is more than model.vocab_size=400"),
    ],
)
def test_models_that_do_not_fit_are_told_at_once(model: dict[str, Any], message: str, config: PipelineConfig) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, run=replace(config.run, model=replace(config.run.model, **model)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sparsify", {"sequences": 100_000}, "calibration needs 100000 sequences of 64 tokens, the train split holds"),
        ("serve", {"prompt": "def " * 60}, r"serve.prompt has \d+ tokens and its answer serve.tokens=8"),
    ],
)
def test_data_that_is_too_short_is_told_before_a_stage_begins(
    part: str, change: dict[str, Any], message: str, config: PipelineConfig, made_up: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        job.run_pipeline(replace(config, **{part: replace(getattr(config, part), **change)}))
    assert not made_up
    assert not config.root.exists()


def test_data_that_is_still_to_be_prepared_is_checked_before_training(
    config: PipelineConfig, made_up: list[str], tmp_path: Path
) -> None:
    corpus: FilesCorpus = config.run.data  # type: ignore[assignment]
    run = replace(config.run, data=replace(corpus, path=str(tmp_path / "fresh"), files=(f"{ROOT}/raygrow/c*.py",)))
    with pytest.raises(ValueError, match="calibration needs 1000 sequences of 64 tokens, the train split holds"):
        job.run_pipeline(replace(config, run=run, sparsify=replace(SPARSIFY, sequences=1000)))
    assert not made_up


def test_a_folder_of_something_else_is_left_alone(config: PipelineConfig, made_up: list[str]) -> None:
    config.root.mkdir(parents=True)
    (config.root / "run.yaml").touch()
    with pytest.raises(ValueError, match="holds something other than a pipeline"):
        job.run_pipeline(config)
    assert not made_up


@pytest.mark.parametrize("name", ["pipeline", "pipeline_quickstart"])
def test_the_shipped_settings_are_pipelines(name: str) -> None:
    config = read_pipeline(composed(name=name))
    assert config.model.n_experts == 4
    assert [phase.growth and phase.growth.operator for phase in config.run.plan.phases.values()] == [
        *(None, "gstack", "experts"),
    ]
    assert read_pipeline(as_tree(config)) == config
    assert isinstance(config.model, ModelConfig)
