"""The report's files, from run folders to what a reader opens."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from rich.console import Console

from raygrow.data.corpus import FilesCorpus, TokenizerConfig
from raygrow.data.prepare import prepare
from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.width import Width
from raygrow.report.html import write_report
from raygrow.report.plots import MAX_POINTS, thinned
from raygrow.report.text import print_summary
from raygrow.weights.verify import BlockDrift
from tests.report.conftest import GROWTH, write_run


def printed(*runs: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(runs, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_one_file_says_it_all(pair: tuple[Path, Path], tmp_path: Path):
    report = write_report([pair[0]], tmp_path / "out")
    page = report.read_text()
    assert "<h1>Growth won</h1>" in page
    assert page.count("<svg") == 4
    assert "demo-scratch" in page
    assert "1.510 (at most 3)" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<link|<script""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert references <= set(ids)
    assert sorted(file.name for file in report.parent.iterdir()) == ["loss.png", "report.html"]


def test_the_picture_is_drawn(pair: tuple[Path, Path], tmp_path: Path):
    write_report([pair[0]], tmp_path)
    pixels = matplotlib.image.imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (768, 2080)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_a_run_in_progress(pair: tuple[Path, Path], tmp_path: Path):
    (pair[0] / "summary.json").unlink()
    history = pair[0] / "history.jsonl"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:3]))  # not evaluated yet
    page = write_report([pair[0]], tmp_path).read_text()
    assert "Nothing to compare yet" in page
    assert "in progress" in page


@pytest.mark.filterwarnings("error")
def test_a_run_without_an_evaluation_has_its_name_in_the_legend(pair: tuple[Path, Path], tmp_path: Path):
    history = pair[1] / "history.jsonl"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:3]))
    page = write_report([pair[1]], tmp_path).read_text()
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert any("demo-scratch" in figure for figure in figures)


def test_a_failed_run_gives_its_reason(pair: tuple[Path, Path]):
    reason = "the loss diverged at step 70 <of> target"
    (pair[0] / "summary.json").write_text(json.dumps({"status": "failed", "reason": reason}))
    assert reason in " ".join(printed(*pair).split())


def test_a_run_that_failed_before_its_first_step(pair: tuple[Path, Path], tmp_path: Path):
    for run in pair:
        (run / "history.jsonl").unlink()
    (pair[0] / "summary.json").write_text(json.dumps({"status": "failed", "reason": "a shard is missing"}))
    page = write_report([pair[0]], tmp_path / "out").read_text()
    assert "demo failed: a shard is missing" in page
    assert "<svg" not in page
    assert "demo failed: a shard is missing" in printed(pair[0])


def test_a_growth_without_finite_figures_shows_dashes(failed_growth: Path, tmp_path: Path):
    assert "null" in (failed_growth / "growth/target.json").read_text()
    page = write_report([failed_growth], tmp_path / "out").read_text()
    for shown in (page, printed(failed_growth, width=160)):
        assert "FAILED" in shown
        assert "3.410 \u2192 -" in shown


def test_runs_of_the_same_name_are_told_apart(pair: tuple[Path, Path], tmp_path: Path):
    other = write_run(tmp_path / "elsewhere/demo", grown=True, ease=0.5)
    page = write_report([pair[0], other], tmp_path / "out").read_text()
    assert "Growth won 1 of 2 comparisons" in page
    text = printed(pair[0], other, width=160)
    assert "elsewhere/demo: target" in text
    assert "elsewhere/demo" in page


def test_the_loss_of_token_frequencies_is_the_same_wherever_one_looks_from(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        assert "token frequencies" not in printed(*pair)
        write_report([pair[0]], tmp_path / "out")
    assert len([r for r in caplog.records if "no unigram loss" in r.getMessage()]) == 1

    runs, home = tmp_path / "home/runs", tmp_path / "home"
    run = write_run(runs / "demo", grown=True, ease=1.5, storage_path="runs")
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}: some text\n" * 5)
    tokenizer = TokenizerConfig(vocab_size=270)
    prepare(FilesCorpus(path=str(home / "data"), files=str(tmp_path / "*.txt"), tokenizer=tokenizer))
    for folder in (home, runs, tmp_path):
        monkeypatch.chdir(folder)
        assert "that token frequencies alone would give" in " ".join(printed(run).split())


@pytest.mark.parametrize("width", [80, 160])
def test_the_terminal_shows_whole_figures(pair: tuple[Path, Path], width: int):
    text = printed(pair[0], width=width)
    assert "Growth won" in text
    assert "18.4M → 41.2M" in text
    assert "…" not in text


@pytest.fixture
def multistage(tmp_path: Path) -> Path:
    """A run through four phases: dense, experts, width, depth."""
    run = tmp_path / "stages"
    (run / "growth").mkdir(parents=True)
    names = ["dense", "moe", "wide", "deep"]
    operators = [Experts(), Width(untie=True), Depth(extra_layers=3)]
    lines = []
    for index, name in enumerate(names):
        for step in (10, 20):
            done = 20 * index + step
            line = {"phase": name, "step": step, "tokens": done, "flops": 1e9 * done, "seconds": float(done)}
            line |= {"loss": 6 - 0.05 * done, "lr": 1e-3, "tokens_per_second": 1.0, "mfu": None, "memory_bytes": 2**34}
            line |= {"val_loss": 6 - 0.05 * done}
            line |= {"balance_loss": 1.02, "expert_load_max": 2.5, "expert_load_min": 0.25} if index else {}
            line |= {"expert_divergence": 0.01 * step} if name == "moe" else {}
            line |= {"head_divergence": 0.002 * step} if name == "wide" else {}
            lines.append(line)
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    phases = {name: {} for name in names}
    (run / "run.yaml").write_text(yaml.safe_dump({"name": "stages", "plan": {"phases": phases}}, sort_keys=False))
    described = [{"name": name, "parameters": 9000, "active_parameters": 4000} for name in names]
    (run / "summary.json").write_text(json.dumps({"status": "finished", "phases": described}))
    for name, operator in zip(names[1:], operators, strict=True):
        routed = {"router": 3e-6, "router_scale": 1.0, "rerouted": 0.0} if name != "moe" else {}
        blocks = [BlockDrift(block=0, source=0, residual=1e-7), BlockDrift(block=1, source=1, residual=2e-7, **routed)]
        record = replace(
            GROWTH,
            operator=asdict(operator),
            loss_after=GROWTH.loss_before + 2e-5,
            blocks=blocks,
        )
        (run / f"growth/{name}.json").write_text(json.dumps(record.to_json()))
    return run


def test_a_run_of_many_phases(multistage: Path, tmp_path: Path):
    page = write_report([multistage], tmp_path / "out").read_text()
    assert page.count("<svg") == 6
    for title in ("Copies come apart", "Expert load", "At the end of each phase"):
        assert title in page
    for figure in ("16 GiB", "experts apart", "heads apart", "0.25", "4k"):
        assert f">{figure}<" in page


@pytest.mark.parametrize("width", [80, 100, 150, 200])
def test_growths_come_in_the_order_of_the_plan_and_in_full(multistage: Path, width: int):
    text = printed(multistage, width=width)
    assert "…" not in text
    words = text.split()
    places = [words.index(operator) for operator in ("experts", "width", "depth")]
    assert places == sorted(places)
    assert {"moe", "wide", "deep", "norm_topk_prob=True", "noise_snr_db=10.0", "identity=False"} <= set(words)
    assert "drop=0.0" not in words  # what is off
    assert "2e-05" in words
    assert "2e-07" in words
    assert "3e-06" in words


def test_thinned_keeps_the_mean():
    x, y = thinned(np.arange(1501.0), np.ones(1501))
    assert len(x) <= MAX_POINTS
    assert np.allclose(y, 1)
    assert np.all(np.diff(x) > 0)
