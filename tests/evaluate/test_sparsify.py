"""`raygrow sparsify`: the folder it writes, what that folder's plan and card say, and what is refused."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raygrow.cli import main
from raygrow.evaluate.perplexity import evaluate_model
from raygrow.evaluate.sparsify import sparsify_model
from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.nn.config import ModelConfig
from raygrow.nn.init import init_weights
from raygrow.nn.rack import Rack
from raygrow.sparsity.apply import sparse
from raygrow.sparsity.card import Row
from raygrow.sparsity.config import SparsifyConfig
from raygrow.sparsity.inputs import INPUTS
from raygrow.sparsity.methods import METHODS, ROTATIONS
from raygrow.sparsity.plan import PLAN_FILE, load_plan
from raygrow.weights.folder import load_model, open_folder, write_folder

TOKENS = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = {"sequences": 4, "seq_len": 24, "evaluate_sequences": 6, "split": "ratio", "device": "cpu"}


def made(folder: Path, out: Path, data: Path, **settings):
    split = {"split": None} if settings.get("method") == "relu" else {}
    return sparsify_model(folder, out, data, SparsifyConfig(**{**SMALL, **split, **settings}))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "relu"])
@torch.no_grad()
def test_the_folder_holds_the_same_model_and_the_losses_that_its_card_tells(
    method, model_folder: Path, model: Rack, data: Path, tmp_path: Path
):
    sparsified = made(model_folder, tmp_path / "out", data, method=method, sparsity=(0.3, 0.5))
    torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    assert open_folder(tmp_path / "out").config.rotation == ROTATIONS[method]
    assert load_plan(open_folder(tmp_path / "out")) == sparsified.plan
    card = (tmp_path / "out/README.md").read_text()
    dense, *levels = sparsified.rows
    for row in levels:
        assert row.nominal == pytest.approx(row.sparsity, abs=0.02)
        assert f"| {row.sparsity:g} | {row.nominal:.1%} | {row.skipped:.1%} " in card
        for policy in ("all", "decode"):
            record = evaluate_model(
                tmp_path / "out",
                data,
                sequences=6,
                seq_len=24,
                sparsity=row.sparsity,
                policy=policy,
                device="cpu",
            )
            assert record.loss == pytest.approx(row.losses[policy], rel=1e-5)
            assert record.tokens == 6 * (24 if policy == "all" else 12)
            error = row.error(dense, policy)
            assert error is not None
            assert f"{row.perplexity(policy):.4f} ({row.rise(dense, policy):+.2%} ± {100 * error:.2g})" in card
    assert ("| rotated, nothing dropped |" in card) == (ROTATIONS[method] != "none")
    assert levels[1].losses["all"] != pytest.approx(dense.losses["all"], rel=1e-4)
    assert (levels[0].skipped < levels[0].nominal) == (ROTATIONS[method] == "block")


@torch.no_grad()
def test_hidden_units_at_zero_are_a_level_that_costs_nothing(
    config: ModelConfig, tokenizer, data: Path, tmp_path: Path
):
    rectified = replace(config, mlp="reglu", mlp_bias=False, dense_blocks=(0, 1))
    rack = Rack(rectified)
    init_weights(rack, rectified, seed=1)
    tokenizer.save(tmp_path / "tokenizer")
    write_folder(tmp_path / "dense", rectified, rack.named_parameters(), tokenizer_from=tmp_path / "tokenizer")
    dense, row = made(tmp_path / "dense", tmp_path / "out", data, method="relu").rows
    assert row.sparsity == round(row.nominal, 2) > 0.1
    assert row.losses == pytest.approx(dense.losses, rel=1e-6)
    plan = load_plan(open_folder(tmp_path / "out"))
    assert plan.level(row.sparsity).nominal == row.nominal
    settings = {"sequences": 6, "seq_len": 24, "device": "cpu", "policy": "all"}
    losses = [evaluate_model(tmp_path / "out", data, **settings, sparsity=level).loss for level in (None, row.sparsity)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_result_is_told_once(
    model_folder: Path, data: Path, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture
):
    words = [f"data={data}", "sparsity=[0.3,0.5]", "method=topk", "split=uniform", "seq_len=24", "device=cpu"]
    assert main(["sparsify", str(model_folder), str(tmp_path / "out"), *words]) == 0
    out, error = capsys.readouterr()
    told = out + error + caplog.text
    assert [told.count(f"sparsity {level}: ") for level in (0.3, 0.5)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "calibrated"),
    [
        (
            {"search_sequences": 2},
            "the bases and the thresholds on 4 sequences, splits are tried out on 2 sequences of 24 tokens",
        ),
        ({"split": "uniform", "method": "rotated_wina"}, "the bases on 4 sequences of 24 tokens"),
        (
            {"split": "uniform", "search_sequences": 2, "method": "teal"},
            "the thresholds on 4 sequences, their common factor on 2 sequences of 24 tokens",
        ),
    ],
)
def test_the_commands_of_a_card_make_the_model_and_its_figures_again(
    settings: dict, calibrated: str, model_folder: Path, data: Path, tmp_path: Path, capsys
):
    first = made(model_folder, tmp_path / "a folder", data, sparsity=(0.3, 0.5), **settings)
    card = (tmp_path / "a folder/README.md").read_text()
    sparsify, *evaluations = [shlex.split(line)[1:] for line in card.splitlines() if line.startswith("raygrow ")]
    again = str(tmp_path / "again")
    assert main([again if word == "MODEL" else word for word in sparsify] + ["device=cpu"]) == 0
    assert load_plan(open_folder(tmp_path / "again")) == first.plan
    for words in evaluations:
        capsys.readouterr()
        assert main([again if word == "MODEL" else word for word in words]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["loss"] == pytest.approx(first.rows[-1].losses[record["policy"]], rel=1e-5)
    assert f"- **calibrated** {calibrated}" in card
    assert "- **made** in float32 on " in card
    assert f"torch {torch.__version__}" in card


def test_the_error_of_a_rise_is_that_of_sequences_in_pairs():
    def row(*losses: float) -> Row:
        return Row(sparsity=0.5, nominal=0.5, skipped=0.5, sequence_losses={"all": losses})

    dense = row(1.0, 2.0, 6.0)
    assert row(1.1, 2.1, 6.1).error(dense, "all") == pytest.approx(0, abs=1e-12)
    assert row(1.1, 2.2, 6.3).error(dense, "all") == pytest.approx(math.exp(0.2) * 0.1 / math.sqrt(3))
    assert row(1.1).error(row(1.0), "all") is None


def test_a_card_without_a_text_says_so_and_is_named_by_its_run(model_folder: Path, data: Path, tmp_path: Path):
    (tmp_path / "run.yaml").touch()
    made(model_folder, tmp_path / "out", data, sparsity=0.4, method="topk", split="uniform")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith(f"# {tmp_path.name}, sparse\n")
    assert "- **calibrated** on nothing" in card
    kept = next(line for line in card.splitlines() if line.startswith("| 0.4 | uniform |"))
    assert [int(share) for share in re.findall(r"(\d+)% \(", kept)] == pytest.approx([60] * len(INPUTS), abs=1)


def test_a_model_without_zeros_has_none_to_skip(model_folder: Path, data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="method=relu: hidden units of mlp=swiglu are never exactly zero"):
        made(model_folder, tmp_path / "out", data, method="relu")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_hugging_face_model_with_one_basis_stays_one_and_is_untied(
    config: ModelConfig, tokenizer, data: Path, tmp_path: Path
):
    llama = replace(config, qk_norm=False, n_experts=0, top_k=0, d_expert=0, dense_blocks=(), tie_embeddings=True)
    rack = Rack(llama)
    init_weights(rack, llama, seed=1)
    tokenizer.save(tmp_path / "tokenizer")
    write_folder(tmp_path / "hf", llama, rack.named_parameters(), format="hf", tokenizer_from=tmp_path / "tokenizer")
    made(tmp_path / "hf", tmp_path / "out", data, sparsity=0.4)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["model_type"] == "llama"
    assert settings["tie_word_embeddings"] is False
    torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), rack(TOKENS), rtol=1e-4, atol=1e-4)
    assert load_plan(open_folder(tmp_path / "out")).rotation == "global"
    with pytest.raises(ValueError, match=r"is rotated already \(rotation=global\)"):
        made(tmp_path / "out", tmp_path / "again", data)
    made(tmp_path / "hf", tmp_path / "larosa", data, sparsity=0.4, method="larosa")
    assert open_folder(tmp_path / "larosa").format == "raygrow"


def test_the_card_tells_how_fast_it_decodes_if_asked_to(
    config: ModelConfig, tokenizer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("raygrow.evaluate.speed.ANSWER", 5)
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    tokenizer.save(tmp_path / "tokenizer")
    write_folder(tmp_path / "own", config, rack.named_parameters(), tokenizer_from=tmp_path / "tokenizer")
    made(tmp_path / "own", tmp_path / "sparse", data, sparsity=(0.3, 0.5), speed=True)
    head, _, told = (tmp_path / "sparse/README.md").read_text().partition("\n## Speed\n")
    assert "## Running it" in head
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["dense", "0.3", "0.5"]
    for _, rate, times in rows[2:]:
        assert float(times) == pytest.approx(float(rate) / float(rows[2][1]), abs=0.01)
    assert "5 tokens after a prompt of 12, by raygrow's engine in float32 on" in told
    assert f"{torch.get_num_threads()} threads" in told


def test_speed_needs_a_tokenizer(config: ModelConfig, data: Path, tmp_path: Path):
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    write_folder(tmp_path / "own", config, rack.named_parameters())
    with pytest.raises(ValueError, match=r"^speed=true: .*own has no tokenizer\.json, which the engine needs"):
        made(tmp_path / "own", tmp_path / "sparse", data, sparsity=0.4, speed=True)
    assert not (tmp_path / "sparse").exists()


def test_an_export_takes_the_plan_and_the_card_along(config: ModelConfig, tokenizer, data: Path, tmp_path: Path):
    mixture = replace(config, n_stacks=1, blocks_per_stack=2, dense_blocks=())
    rack = Rack(mixture)
    init_weights(rack, mixture, seed=1)
    tokenizer.save(tmp_path / "tokenizer")
    write_folder(tmp_path / "own", mixture, rack.named_parameters(), tokenizer_from=tmp_path / "tokenizer")
    made(tmp_path / "own", tmp_path / "sparse", data, sparsity=0.4)
    assert main(["export", str(tmp_path / "sparse"), str(tmp_path / "hf")]) == 0
    settings = {"sequences": 6, "seq_len": 24, "sparsity": 0.4, "device": "cpu"}
    losses = [evaluate_model(tmp_path / name, data, **settings).loss for name in ("sparse", "hf")]
    assert losses[0] == losses[1]
    assert (tmp_path / "hf/README.md").read_text() == (tmp_path / "sparse/README.md").read_text()


def test_an_export_whose_plan_cannot_be_copied_leaves_nothing(model_folder: Path, tmp_path: Path, capsys):
    (model_folder / PLAN_FILE).mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(model_folder), str(tmp_path / "out"), "--format", "raygrow"]) == 2
    assert "raygrow: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sparsity=1"], "sparsity=1: must be at least 0 and below 1"),
        (["sparsity=[0.4,-0.1]"], "sparsity=-0.1: must be at least 0 and below 1"),
        (["sparsity=[]"], "name at least one"),
        (["sparsity=0.99"], "sparsity=0.99: more than can be dropped"),
        (["sparsity=much"], "sparsity='much'"),
        (["method=magic"], "method='magic'"),
        (["sequences=1000"], "calibration needs 1000 sequences of 48 tokens, the train split holds"),
        (["sequences=1", "seq_len=8"], "fewer tokens than d_model=32"),
        (["seq_len=49"], "seq_len=49: this model takes 2 to 48 tokens"),
        (["data=nowhere"], "no prepared data here"),
        (["colour=red"], "colour"),
        (["method=relu", "sparsity=0.9"], "sparsity=0.9: method=relu drops what is zero in every case"),
        (["method=relu", "split=search"], "split=search: method=relu drops what is zero in every case"),
        (
            ["method=topk", "split=uniform", "search_sequences=2"],
            "search_sequences=2: with split=uniform, method=topk tries",
        ),
        (["sequences=4", "search_sequences=100"], "search_sequences=100: they are the first of the calibration text"),
        (["data=2024"], "2024: no prepared data here"),
        (["data=007"], "007: no prepared data here"),
        (["device=gpu"], "device=gpu: nothing can be computed there, only on cpu"),
        (["device=meta"], "device=meta: nothing can be computed there"),
        (["sparsity"], "cannot be read as key=value"),
    ],
)
def test_what_cannot_be_made_is_named_and_nothing_is_written(
    words, message, model_folder: Path, data: Path, tmp_path: Path, capsys
):
    given = [f"data={data}", *words] if not any(word.startswith("data=") for word in words) else words
    before = sorted(tmp_path.iterdir())
    assert main(["sparsify", str(model_folder), str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_memory_says_what_to_lower(
    model_folder: Path, data: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("raygrow.sparsity.sparsify.calibrate", full)
    assert main(["sparsify", str(model_folder), str(tmp_path / "out"), f"data={data}", "seq_len=24"]) == 2
    error = capsys.readouterr().err
    assert "raygrow: batch_size=4: " in error
    assert "lower batch_size or seq_len, or use device=cpu" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "method"), [(math.nan, "topk"), (math.inf, "larosa")])
def test_a_model_with_weights_that_are_no_numbers_is_named(
    value, method, config: ModelConfig, data: Path, tmp_path: Path, capsys
):
    rack = Rack(config)
    init_weights(rack, config, seed=1)
    rack.state_dict()["blocks.1.attention.o.weight"][0, 0] = value
    write_folder(tmp_path / "broken", config, rack.named_parameters())
    before = sorted(tmp_path.iterdir())
    words = [f"data={data}", "seq_len=24", f"method={method}"]
    assert main(["sparsify", str(tmp_path / "broken"), str(tmp_path / "out"), *words]) == 2
    assert f"raygrow: {tmp_path}/broken: the loss of this model is nan" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_data_has_to_be_named(model_folder: Path, tmp_path: Path, capsys):
    assert main(["sparsify", str(model_folder), str(tmp_path / "out"), "sparsity=0.4"]) == 2
    assert "data is missing: name a folder of prepared data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layernorm"}, "/m: rotation=global: only rmsnorm is the same in every basis, not layernorm; set"),
        ({"rotation": "block"}, r"is rotated already (rotation=block)"),
        ({"attention_mode": "bidirectional"}, "attention_mode=bidirectional: only a model that generates text"),
    ],
)
def test_a_model_that_cannot_be_made_sparse_is_named(
    fields, message, config: ModelConfig, tokenizer, data: Path, tmp_path: Path, capsys
):
    tokenizer.save(tmp_path / "tokenizer")
    other = replace(config, **fields)
    write_folder(tmp_path / "m", other, Rack(other).named_parameters(), tokenizer_from=tmp_path / "tokenizer")
    assert main(["sparsify", str(tmp_path / "m"), str(tmp_path / "out"), f"data={data}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(model_folder: Path, data: Path, capsys):
    before = (model_folder / "config.json").read_bytes()
    assert main(["sparsify", str(model_folder), str(model_folder), f"data={data}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (model_folder / "config.json").read_bytes() == before


def damaged(change):
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is a dense model: it has no sparsity.json"),
        (
            damaged(lambda content: content.update(version=1)),
            "version 1, this raygrow reads 2; run `raygrow sparsify` again, on the dense model",
        ),
        (damaged(lambda content: content.pop("fingerprint")), "cannot be read (KeyError: 'fingerprint')"),
        (damaged(lambda content: content.update(method="magic")), "method='magic' is none of"),
        (damaged(lambda content: content.pop("levels")), "cannot be read (KeyError: 'levels')"),
        (
            damaged(lambda content: content["levels"]["0.4"]["blocks"].pop()),
            "about a model of 2 blocks, this one has 3",
        ),
        (
            damaged(lambda content: content["levels"]["0.4"]["blocks"][1].update(o={"keep": 33})),
            "block 1 keeps 33 entries of `o`, which has 32",
        ),
        (
            damaged(lambda content: content["levels"]["0.4"]["blocks"][1].update(o={"keep": 9, "groups": [8]})),
            "block 1: the groups of `o` do not make up what it keeps, 9 entries",
        ),
        (
            damaged(lambda content: content["levels"]["0.4"]["blocks"][1].update(o={"keep": 9, "groups": [9]})),
            "block 1: what is kept of `o` is not chosen as method topk does",
        ),
        (
            damaged(lambda content: content.update(method="grouped")),
            "block 0: what is kept of `attention` is not chosen as method grouped does",
        ),
        (
            damaged(lambda content: content.update(method="teal")),
            "block 0: what is kept of `attention` is not chosen as method teal does",
        ),
        (damaged(lambda content: content["levels"].update({"0.9": content["levels"].pop("0.4")})), "was made for 0.9"),
    ],
)
def test_a_level_or_plan_that_is_not_there_or_damaged_is_named(
    damage, message, model_folder: Path, data: Path, tmp_path: Path, capsys
):
    made(model_folder, tmp_path / "out", data, sparsity=0.4, method="topk", split="uniform")
    plan = load_plan(open_folder(tmp_path / "out"))
    assert set(plan.levels[0.4].choices) == {(block, name) for block in range(3) for name in INPUTS}
    damage(tmp_path / "out" / PLAN_FILE)
    words = ["evaluate", str(tmp_path / "out"), "--data", str(data), "--sparsity", "0.4", "--seq-len", "24"]
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@torch.no_grad()
def test_groups_are_read_as_they_were_written(model_folder: Path, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    plan = made(model_folder, out, data, sparsity=(0.4, 0.6), method="grouped").plan
    choices = plan.levels[0.6].choices
    assert load_plan(open_folder(out)).levels[0.6].choices == choices
    assert all(choice.groups is None or sum(choice.groups) == choice.keep for choice in choices.values())
    assert any(choice.groups for choice in choices.values())
    model, fresh = load_model(out), load_model(out)
    tokens = torch.arange(16)[None]
    assert not torch.allclose(sparse(model, plan, 0.6)(tokens), fresh(tokens))


@torch.no_grad()
def test_a_plan_is_for_its_weights_alone(model_folder: Path, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    made(model_folder, out, data, sparsity=0.4, method="topk", split="uniform")
    plan = (out / PLAN_FILE).read_text()
    trained = load_model(out)
    trained.blocks[1].attention.o.weight *= 1.01
    write_folder(out, trained.config, trained.named_parameters(), tokenizer_from=model_folder, replace=True)
    (out / PLAN_FILE).write_text(plan)
    words = ["evaluate", str(out), "--data", str(data), "--sparsity", "0.4", "--seq-len", "24"]
    message = f"{out / PLAN_FILE}: it was made for other weights than those that now lie beside it; put its own back"
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=re.escape(message)):
        load_engine(out, EngineConfig(device="cpu", sparsity=0.4))
    load_engine(out, EngineConfig(device="cpu")).close()
