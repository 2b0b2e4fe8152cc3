"""The command line: help, errors in one paragraph, and each command that needs no training."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from raygrow.cli import main
from raygrow.growth.operator import GrowthConfig
from raygrow.infer.config import EngineConfig
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.runtime.serve import check_port
from raygrow.runtime.serve_config import read_config
from raygrow.sparsity.config import SparsifyConfig
from raygrow.text.tokenizer import train_tokenizer
from raygrow.train.config import TrainConfig
from raygrow.weights.folder import load_model, open_folder, write_folder
from tests.sparsity.plans import add_plan

ROOT = Path(__file__).parents[1]
COMMANDS = ("prepare", "train", "tune", "pipeline", "grow", "timing", "evaluate", "sparsify", "export", "report")
COMMANDS += ("generate", "serve", "chat")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["raygrow"])
    monkeypatch.delenv("RAYGROW_TRACEBACK", raising=False)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    config = ModelConfig(vocab_size=300, d_model=16, n_heads=2, d_ff=24, blocks_per_stack=2, max_seq_len=32)
    model = Rack(config)
    init_weights(model, config, seed=0)
    return write_folder(tmp_path / "small", config, model.state_dict().items())


def failed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one paragraph that a command fails with."""
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("raygrow: ")
    assert error.count("\n") == 1, error
    return error


def test_alone_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"raygrow {command}" in overview for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"raygrow {command} " in capsys.readouterr().out.partition("Examples:")[2]


@pytest.mark.parametrize(
    ("command", "configs"), [("sparsify", [SparsifyConfig]), ("grow", get_args(GrowthConfig))], ids=["sparsify", "grow"]
)
def test_help_names_every_setting(
    command: str, configs: Sequence[type[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out.partition("Examples:")[0]
    settings = {setting.name for config in configs for setting in fields(config)}
    assert not [setting for setting in settings if not re.search(rf"\b{setting}\b", shown)]


def test_help_and_arithmetic_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from raygrow.cli import main; main([]); main(['timing', '--params', '1e9', '--tokens', '1e11']);"
        "print(sorted({'torch', 'ray', 'hydra', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("params", "tokens", "base"),
    [("8e9", "15e12", 6.58), ("7e9", "2e12", 11.11), ("13e9", "2e12", 15.84), ("70e9", "2e12", 42.48)],
)
def test_timing(params: str, tokens: str, base: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timing", "--params", params, "--tokens", tokens]) == 0
    told = re.search(r"train the base on (\S+)e9 tokens", capsys.readouterr().out)
    assert told
    assert round(float(told[1]), 2) == base


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train.optimiser.lr=1"], "train.optimiser: there is no such key. Did you mean train.optimizer?"),
        (["sead=1"], "sead: there is no such key. Did you mean seed?"),
        (["plan=gstck"], "plan/gstck: there is no such settings file. Available for plan: gstack, "),
        (["model=nope"], "decoder/llama/1b, decoder/llama/small, decoder/llama/tiny, decoder/moe/450m, "),
        (["model=decoder/llama/nope"], "model/decoder/llama/nope: there is no such settings file"),
        (["data=files"], "data.files is missing"),
        (["plan.phases.stacked.growth.factor=2.5"], "plan.phases.stacked.growth.factor=2.5"),
        (["plan.phases.stacked.growth.factor=3", "dry_run=true"], "factor=3"),
        (["plan.phases.base.share=1", "dry_run=true"], "plan.phases.stacked"),
        (["name=${nothing}"], "nothing"),
        (["a=b=["], "a=b=["),
        (["--config-name", "nothing"], "nothing"),
    ],
)
def test_wrong_settings_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in failed(capsys, "train", *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["grow", "nowhere", "out", "operator=gstack"], "nowhere"),
        (["grow", "nowhere", "out", "factor"], "'factor'"),
        (["grow", "nowhere", "out", "factor=["], "'factor=['"),
        (["generate", "nowhere", "--tokens", "0"], "tokens=0"),
        (["grow", "nowhere", "out", "operator=gstack", "factor=2.5"], "factor=2.5"),
        (["grow", "nowhere", "out", "operator=gstack", "facto=2"], "Did you mean factor?"),
        (["grow", "nowhere", "out", "factor=2"], "operator=None: must be one of gstack, depth, width, experts"),
        (["grow", "nowhere", "out", "operator=width", "factor=1.5"], "factor=1.5"),
        (["grow", "nowhere", "out", "operator=experts", "n_experts=2", "top_k=3"], "n_experts=2"),
        (["grow", "nowhere", "out", "operator=gstack", "format=onnx"], "format='onnx'"),
        (["timing", "--params", "0", "--tokens", "1"], "params=0"),
        (["evaluate", "nowhere", "--data", "nothing"], "nothing"),
        (["export", "nowhere", "out"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["generate", "nowhere"], "nowhere"),
        (["serve", "nowhere"], "nowhere"),
        (
            ["serve", "nowhere", "engine_kwargs.max_num_seq=1"],
            "Did you mean llm_configs[0].engine_kwargs.max_num_seqs?",
        ),
        (["serve", "nowhere", "engine_kwargs.dtype=int8"], "engine_kwargs.dtype='int8'"),
        (["serve", "nowhere", "--name", "a", "deployment_config.autoscaling_config.min_replicas=2"], "min_replicas=2"),
        (["serve", "a/nowhere", "b/nowhere"], "model_id='nowhere'"),
        (["serve", "a", "b", "--name", "both"], "--name both"),
        (["serve", "nowhere", "api.max_request_bytes=0"], "max_request_bytes=0"),
        (["chat", "nowhere"], "nowhere"),
        (["serve", "a/nowhere", "b/nowhere"], "give them other names"),
        (["serve", "nowhere", "max_num_seqs=1"], "they begin with engine_kwargs"),
        (["chat", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9/v1"),
        (["chat", "127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1"),
        (["chat", "nowhere"], "nowhere: there is no such folder"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere: there is no such folder; give one that holds a model"),
        (["prepare", "data=files", "data.files=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_missing_is_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in failed(capsys, *words)
    assert not Path("out").exists()


def test_a_run_without_a_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/run.yaml").touch()
    assert "run: this run has no finished model yet" in failed(capsys, "generate", "run")


def test_keys_that_no_yaml_file_mentions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "plan.phases.stacked.lr=5e-4", "train.compile=off", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.0005" in shown
    assert "compile: 'off'" in shown


@pytest.mark.parametrize("words", [["--multirun", "plan=gstack,scratch"], ["plan=gstack,scratch", "--multirun"]])
def test_dry_run_of_several_plans_leaves_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dry_run=true", *words]) == 0
    shown = capsys.readouterr().out
    assert "gstack (factor 4)" in shown
    assert "\nscratch " in shown
    assert list(Path().iterdir()) == []


def test_dry_run_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dry_run=true", "train.optimizer.eps=1e-7"]) == 0
    settings, _, table = capsys.readouterr().out.partition("\n\n")
    run = yaml.safe_load(settings)
    assert run["train"]["optimizer"]["eps"] == 1e-7
    assert run["train"]["diverged_above"] == TrainConfig().diverged_above
    assert table.startswith("phase")


def test_a_space_file_may_bear_a_shipped_ones_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my").mkdir()
    Path("my/growth_timing.yaml").write_text("space: {plan.phases.base.share: {grid: [0.33]}}\n")
    assert main(["tune", "space=my/growth_timing.yaml", "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("growth_timing-")
    assert "share-0.33 " in told
    assert "2 trials" in told


def test_prepare_takes_dry_run_and_no_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data.roots=site-packages", "dry_run=true"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["roots"] == "site-packages"
    assert "sead: there is no such key. Did you mean seed?" in failed(capsys, "prepare", "sead=3")
    assert list(Path().iterdir()) == []


def test_help_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    assert "raygrow pre-trains" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["help", "grow"])
    assert left.value.code == 0
    assert "Grow a model folder" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", "--bogus"], ["prepare", "a=1", "--bogus"], ["grow", "a", "b", "--bogus"]])
def test_unknown_options_are_named_without_hydra(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert f"--bogus: not understood, see `raygrow {words[0]} --help`" in error
    assert "hydra" not in error


def test_errors_of_settings_lead_to_no_manual(capsys: pytest.CaptureFixture[str]) -> None:
    error = failed(capsys, "train", "model.n_heads=[")
    assert "model.n_heads=[: cannot be read as key=value" in error
    assert "http" not in error


def test_the_job_script_does_the_same() -> None:
    words = ["model=decoder/llama/tiny", "plan=gstack", "plan.phases.stacked.growth.factor=2", "--cfg", "job"]
    command = [sys.executable, ROOT / "jobs/train.py", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "factor: 2" in result.stdout
    assert list(Path().iterdir()) == []


def test_grow_and_export(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grow", str(small), "big", "operator=gstack", "factor=3"]) == 0
    assert "2 -> 6 blocks" in capsys.readouterr().out
    assert open_folder("big").config.n_blocks == 6

    assert main(["export", "big", "hf", "--format", "hf"]) == 0
    assert open_folder("hf").settings["model_type"] == "llama"

    assert main(["export", "hf", "own", "--format", "raygrow"]) == 0
    for name, tensor in load_model("big").state_dict().items():
        assert torch.equal(load_model("own").state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("words", "grown", "model_type"),
    [
        (["operator=depth", "extra_layers=1", "identity=true"], {"n_blocks": 3}, "raygrow"),
        (["operator=depth", "blocks=[0,0,1,1]"], {"n_blocks": 4}, "raygrow"),
        (["operator=width", "heads=3", "format=raygrow"], {"d_model": 32, "n_heads": 6}, "raygrow"),
        (["operator=width", "format=hf"], {"d_model": 32, "d_ff": 48}, "llama"),
        (["operator=experts", "n_experts=4", "blocks=[1]"], {"n_experts": 4, "dense_blocks": (0,)}, "raygrow"),
        (["operator=experts", "blocks=all", "format=hf"], {"n_experts": 8, "top_k": 2}, "mixtral"),
    ],
)
def test_grow_by_every_operator(
    words: list[str], grown: dict[str, object], model_type: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", str(small), "big", *words]) == 0
    assert capsys.readouterr().out.startswith(f"big ({model_type}): 2 -> ")
    config = open_folder("big").config
    assert {name: getattr(config, name) for name in grown} == grown


def test_a_grown_sparse_model_is_dense_and_says_so(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "sparsity.json").write_text("{}")
    assert main(["grow", str(small), "big", "operator=gstack"]) == 0
    assert f"big is dense: sparsity.json of {small} is for its own weights" in capsys.readouterr().out
    assert not Path("big/sparsity.json").exists()


def test_a_format_that_cannot_hold_the_grown_model_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["operator=experts", "norm_topk_prob=false", "format=hf"]
    assert "norm_topk_prob=False: a Hugging Face Mixtral" in failed(capsys, "grow", str(small), "big", *words)
    assert not Path("big").exists()


def test_the_yaml_of_a_served_model_is_what_serve_takes(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(small), "engine_kwargs.max_num_seqs=8", "--port", "9000", "--yaml", "ingress.num_replicas=2"]
    assert main(["serve", *words, "--sparsity", "0.4"]) == 0
    file = yaml.safe_load(capsys.readouterr().out)
    assert file["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (app,) = file["applications"]
    config = read_config(app["args"])
    assert config.ingress.num_replicas == 2
    assert config.llm_configs[0].engine_kwargs == EngineConfig(max_num_seqs=8, sparsity=0.4)
    assert (config.llm_configs[0].model_id, config.llm_configs[0].model_loading_config.folder) == ("small", small)


def test_a_sparsity_that_cannot_be_is_told_before_anything_starts(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(["a"], 257).save(small)
    assert "is a dense model: it has no sparsity.json" in failed(capsys, "serve", str(small), "--sparsity", "0.4")
    add_plan(small, 0.3, 0.5)
    told = failed(capsys, "serve", str(small), "--sparsity", "0.4")
    assert "small: sparsity=0.4: this model was made for 0.3, 0.5; choose one of them" in told
    told = failed(capsys, "serve", str(small), "engine_kwargs.sparsity=1.4")
    assert "sparsity=1.4: must be at least 0 and below 1" in told


def test_a_broken_chat_template_is_told_before_anything_starts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(["a"], 257).save(small)
    (small / "chat_template.jinja").write_text("{% for %}")
    assert "no valid Jinja" in failed(capsys, "serve", str(small))


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken; choose another with --port"):
            check_port("127.0.0.1", port)
    for port in (0, 70_000):
        with pytest.raises(ValueError, match=f"--port {port}: must be 1 to 65535"):
            check_port("127.0.0.1", port)


def test_nothing_is_written_over(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "small" in failed(capsys, "grow", str(small), str(small), "operator=gstack")


def test_from_text_to_a_score(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_text("".join(f"line {i} of some text\n" for i in range(2000)))
    words = ["data=files", "data.files=text.txt", "data.path=data", "data.tokenizer.vocab_size=280", "data.passage=500"]
    assert main(["prepare", *words]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["evaluate", str(small), "--data", "data", "--sequences", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0

    # a run is scored at the length it was trained at
    assert main(["train", *words, "train.seq_len=8", "dry_run=true"]) == 0
    Path("run").mkdir()
    Path("run/run.yaml").write_text(capsys.readouterr().out.partition("\n\n")[0])
    Path("run/model").symlink_to(small)
    for options, seq_len in (([], 8), (["--seq-len", "16"], 16)):
        assert main(["evaluate", "run", "--data", "data", *options]) == 0
        assert json.loads(capsys.readouterr().out)["seq_len"] == seq_len
    assert "sequences=-1" in failed(capsys, "evaluate", "run", "--data", "data", "--sequences", "-1")

    (small / "tokenizer.json").write_bytes(Path("data/tokenizer/tokenizer.json").read_bytes())
    assert main(["generate", str(small), "--prompt", "line", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("line")
