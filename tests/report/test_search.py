"""The answer of a search, from its folder alone: the best setting, how sure that is, the best plan, the refit."""

import io
import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from raygrow.cli import main
from raygrow.config import RunConfig, build, from_yaml
from raygrow.growth.timing import PUBLISHED
from raygrow.report.compare import compare
from raygrow.report.estimate import estimate
from raygrow.report.html import write_report
from raygrow.report.search import Setting, load_search
from raygrow.report.search_plots import layout
from raygrow.report.search_savings import comparisons, decayed_speedup, gain, speedup
from raygrow.report.search_summary import summarize_search
from raygrow.report.text import print_summary
from raygrow.report.units import short_names
from tests.report.conftest import write_run
from tests.report.searches import BEST_SHARE, FACTOR, SHARE, grid, write_search, write_trial


def answer(folder: Path) -> str:
    """The whole terminal output."""
    console = Console(file=io.StringIO(), width=160)
    print_summary([folder], console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def setting_of(folder: Path, **values: float) -> Setting:
    keys = {"share": SHARE, "factor": FACTOR}
    wanted = {keys[key]: value for key, value in values.items()}
    (contest,) = load_search([folder]).contests
    return next(s for s in contest.settings if s.values == wanted)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grid(tmp_path_factory.mktemp("search") / "timing", seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def budgets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grid(tmp_path_factory.mktemp("search") / "budgets", budgets=(2e6, 4e6, 8e6))


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.303 * np.std([1, 2, 4], ddof=1) / math.sqrt(3))
    alone = estimate([3.0])
    assert alone is not None
    assert alone.half is None
    assert estimate([]) is None


def test_the_best_setting_is_found_whatever_the_order_of_trials(seeds: Path):
    (contest,) = load_search([seeds]).contests
    best, control, formula = contest.best, contest.control, contest.formula
    assert best is not None
    assert control is not None
    assert formula is not None
    assert best.values == {SHARE: BEST_SHARE, FACTOR: 4}
    assert contest.share(best) == pytest.approx(BEST_SHARE, rel=0.02)
    assert best.loss == estimate(trial.val_loss for trial in best.trials if trial.val_loss)
    assert (control.values, formula.values) == ({}, {SHARE: 0.05, FACTOR: 4})
    assert len(best.trials) == len(control.trials) == 3
    assert not contest.at_edge(best)
    assert contest.at_edge(setting_of(seeds, share=0.2, factor=2))


def test_gain_and_speedup_are_taken_seed_by_seed(seeds: Path):
    best, control = setting_of(seeds, share=BEST_SHARE, factor=4), load_search([seeds]).contests[0].control
    assert control is not None
    pairs = [(best.finished[seed], control.finished[seed]) for seed in (0, 1, 2)]
    assert gain(best, control) == estimate(b.val_loss - a.val_loss for a, b in pairs if a.val_loss and b.val_loss)
    by_hand = [compare(a.run, b.run) for a, b in pairs if a.run and b.run]
    assert comparisons(best, control) == by_hand
    assert speedup(best, control, of=lambda c: c.reached) == estimate(
        c.reached.speedup for c in by_hand if c and c.reached.speedup is not None
    )


def test_a_setting_that_fewer_seeds_have_tried_is_not_the_best(tmp_path: Path):
    rows = [write_trial(tmp_path, share=s, seed=seed) for s in (0.03, 0.05) for seed in (0, 1)]
    rows.append(write_trial(tmp_path, share=BEST_SHARE, seed=0))
    (contest,) = load_search([write_search(tmp_path, rows)]).contests
    assert [setting.values[SHARE] for setting in contest.grown] == [0.05, 0.03, BEST_SHARE]


def test_the_words(seeds: Path):
    said = answer(seeds)
    assert "Growth won: share 0.08, factor 4" in said
    assert "ONE SEED" not in said
    assert "Not clearly worse: 1 other setting" in said  # the formula's point, whose interval has zero in it
    assert "Of 25 trials, 1 was stopped early" in said
    assert "a and b, which stay as published" in said
    assert re.search(r"best +0\.08 +4 +8\.0 % +3\.5\d\d ± 0\.0\d\d +3 ", said)
    assert re.search(r"formula +0\.05 +4 ", said)
    assert re.search(r"scratch +- +- ", said)


def test_one_seed_says_nothing_about_noise(tmp_path: Path):
    said = answer(grid(tmp_path, seeds=(4,)))
    assert "ONE SEED" in said
    assert "±" not in said
    assert "seed=5 control=true" in said


def test_noise_larger_than_the_gain_is_no_win(tmp_path: Path):
    rows = [write_trial(tmp_path, share=s, seed=seed, spread=60) for s in (0.08, None) for seed in (0, 1, 2)]
    summary = summarize_search(load_search([write_search(tmp_path, rows)]), tmp_path)
    assert summary.outcome == "tied"
    assert summary.headline.startswith("No clear difference")


def test_the_formulas_best_setting_is_compared_with(tmp_path: Path):
    lr = "train.optimizer.lr"
    rows = [
        write_trial(tmp_path, share=share, formula=share == 0.05, spread=0, values={lr: rate}, best=best)
        for rate, best in ((1e-2, 0.02), (1e-3, 0.05))
        for share in (0.05, 0.2)
    ]
    (contest,) = load_search([write_search(tmp_path, rows)]).contests
    assert contest.formula is not None
    assert contest.formula is contest.best
    assert contest.formula.values[lr] == 1e-3
    assert "The best timing is the formula's." in answer(tmp_path)


def test_a_best_timing_at_the_edge_is_told(tmp_path: Path):
    rows = [write_trial(tmp_path, share=s) for s in (0.01, 0.02, 0.04)]
    assert "the true best may lie beyond it" in answer(write_search(tmp_path, rows))


def test_without_a_control(tmp_path: Path):
    folder = grid(tmp_path, control=False)
    assert "no trial from scratch" in answer(folder)
    assert write_report([folder], folder).read_text().count("<svg") == 1


def test_no_grown_trial_has_finished(tmp_path: Path):
    write_search(tmp_path, [])
    (tmp_path / "results.json").unlink()  # just begun
    assert "No grown trial has finished yet" in answer(tmp_path)
    rows = [write_trial(tmp_path, share=0.05, status="stopped"), write_trial(tmp_path, share=None)]
    lost = {"name": "lost", "values": {SHARE: 0.1}, "status": "failed", "val_loss": None, "flops": None}
    rows.append(lost | {"tokens": None, "seconds": None, "control": False, "formula": False, "folder": "trials/lost"})
    page = write_report([write_search(tmp_path, rows)], tmp_path).read_text()
    assert "No grown trial has finished yet" in page
    assert "1 was stopped early as hopeless and 1 failed" in page
    assert not (tmp_path / "best").exists()


def test_a_search_that_still_goes_on(tmp_path: Path):
    rows = [write_trial(tmp_path, share=s, factor=f) for s in (0.03, 0.08) for f in (2, 4)]
    rows += [write_trial(tmp_path, share=0.05, formula=True), write_trial(tmp_path, share=None)]
    write_search(tmp_path, rows)
    over = load_search([tmp_path])
    (tmp_path / "results.json").unlink()
    space = {SHARE: {"grid": [0.03, 0.08]}, FACTOR: {"grid": [2, 4]}, "seed": {"grid": [0]}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump({"run": {}, "space": {"space": space}}))
    found = load_search([tmp_path])
    assert sorted(found.trials, key=lambda t: t.name) == sorted(over.trials, key=lambda t: t.name)
    # what a trial in training says, in case that it is stopped
    summary = next(iter(tmp_path.glob("trials/share-0.08_factor-4*/summary.json")))
    summary.write_text(json.dumps({"status": "stopped", "phases": []}))
    said = answer(tmp_path)
    assert "Growth won: share 0.05, factor 4" in said
    assert "Of 6 trials, 1 is in progress, or stopped early." in said


def test_trials_that_have_just_begun_by_a_plan_of_steps(tmp_path: Path):
    for share in (0.03, 0.08):
        write_trial(tmp_path, share=share)
    for folder in tmp_path.glob("trials/*"):
        (folder / "history.jsonl").unlink()
        (folder / "summary.json").unlink()
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        settings["plan"] |= {"tokens": None, "phases": {"base": {"steps": 10}, "stacked": {"steps": 10}}}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "search.yaml").write_text("search: grid\n")
    assert "Of 2 trials, 2 are in progress" in answer(tmp_path)


def test_settings_of_another_version_are_named(tmp_path: Path):
    write_search(tmp_path, [write_trial(tmp_path, share=0.08)])
    (file,) = tmp_path.glob("trials/*/run.yaml")
    settings = yaml.safe_load(file.read_text())
    settings["model"]["gone"] = 1
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"run\.yaml: cannot be read .*'gone'"):
        load_search([tmp_path])


def test_one_file_says_it_all(seeds: Path, tmp_path: Path):
    report = write_report([seeds], tmp_path)
    page = report.read_text()
    assert "<h1>Growth won: share 0.08, factor 4</h1>" in page
    assert page.count("<svg") == 3
    for text in ("Settings", "Trials", "The timing formula, refitted", "the formula&#39;s timing", "plan=best seed=3"):
        assert text.replace("&#39;", "'") in page or text in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<link|<script""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)
    pixels = matplotlib.image.imread(tmp_path / "search.png")
    assert pixels.shape[:2] == (768, 2080)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_what_was_spent_is_told_beside_what_it_would_have_been(tmp_path: Path):
    folder = write_search(tmp_path / "one", [write_trial(tmp_path / "one", share=0.05)])
    assert "FLOPs, counted" not in answer(folder)
    (folder / "cost.json").write_text(json.dumps({"spent": 4.1e13, "shared": 6.2e13, "alone": 1e14}))
    said = answer(folder)
    assert "The search spent 4.10e13 FLOPs, counted as they were trained: 41.0 % of the 1.00e14 that" in said
    assert "it would have been 6.20e13" in said
    other = write_search(tmp_path / "two", [write_trial(tmp_path / "two", share=0.05)])
    assert load_search([folder, other]).cost is None  # one of them is not over
    (other / "cost.json").write_text((folder / "cost.json").read_text())
    cost = load_search([folder, other]).cost
    assert cost is not None
    assert cost.alone == 2e14


def test_the_formulas_plan_is_beside_the_best(seeds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["report", str(seeds), "--out", str(tmp_path)]) == 0
    command = next(line for line in capfd.readouterr().out.splitlines() if "plan=formula" in line).split()
    assert command[4:] == ["plan=formula", "seed=3", "name=timing-formula-seed3"]
    assert main([*command[1:], "dry_run=true"]) == 0
    tree = yaml.safe_load(capfd.readouterr().out.partition("phase ")[0])
    assert tree["plan"]["phases"]["base"]["share"] == 0.05
    assert tree["plan"]["tokens"] == 4e6


def test_several_budgets(budgets: Path, tmp_path: Path):
    search = load_search([budgets])
    assert [len(contest.grown) for contest in search.contests] == [7, 7, 7]
    ends = [(contest.best, contest.control) for contest in search.contests]
    # at scratch's loss at the end of the largest budget: where the line through the grown runs' ends comes to it
    wanted = []
    for seed in (0, 1):
        grown, scratch = ([pair[arm].finished[seed] for pair in ends if pair[arm]] for arm in (0, 1))  # type: ignore
        loss, cost = [t.val_loss for t in grown], [t.flops for t in grown]
        reached = np.interp(-scratch[-1].val_loss, [-value for value in loss], cost)
        wanted.append(scratch[-1].flops / reached - 1)
    found = decayed_speedup(search.contests)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(wanted))
    assert found.mean > 0.2
    page = write_report([budgets], tmp_path).read_text()
    assert page.count("<svg") == 6
    assert matplotlib.image.imread(tmp_path / "search.png").shape[:2] == (768, 3120)  # budgets beside the rest
    assert "with a decayed learning rate" in page
    assert "best: speedup +" in page
    assert "<h1>Growth won: share 0.08, factor 4</h1>" in page
    assert decayed_speedup(search.contests[:1]) is None


def test_the_formula_is_refitted_over_targets_and_budgets(tmp_path: Path):
    folders = []
    for d_model in (32, 64):
        folder = tmp_path / f"d{d_model}"
        rows = []
        for tokens, best in ((2e6, 0.16), (8e6, 0.04)):  # d ends up the same: b must come out as good as zero
            shares = (0.02, 0.04, 0.08, 0.16, 0.3)
            rows += [write_trial(folder, share=s, best=best, tokens=tokens, d_model=d_model) for s in shares]
        folders.append(write_search(folder, rows))
    fit = load_search(folders).fit()
    assert fit is not None
    assert (fit.points, fit.rank, fit.fitted) == (4, 3, ("a", "b", "c"))
    assert abs(fit.constants["b"]) < 0.05 * PUBLISHED["b"]
    alone = load_search(folders[:1]).fit()
    assert alone is not None
    assert alone.fitted == ("b", "c")
    assert alone.constants["a"] == PUBLISHED["a"]
    assert "a and b" not in " ".join(summarize_search(load_search(folders), tmp_path).sentences)


def test_the_best_plan_composes_to_the_best_trial(seeds: Path, tmp_path: Path):
    write_report([seeds], tmp_path)
    trial = load_search([seeds]).best_trial
    assert trial is not None
    assert trial.run is not None
    wanted = from_yaml((trial.run.path / "run.yaml").read_text())
    OmegaConf.register_new_resolver("last", lambda path: str(path).rsplit("/")[-1], replace=True)
    with initialize_config_module("raygrow.conf", version_base="1.3"):
        composed = compose("train", ["plan=best", f"hydra.searchpath=[{tmp_path / 'best'}]"])
    found: RunConfig = build(RunConfig, OmegaConf.to_container(composed, resolve=True))
    assert found.name == "timing-best"
    for part in ("model", "data", "plan", "train"):
        assert getattr(found, part) == getattr(wanted, part)
    with initialize_config_module("raygrow.conf", version_base="1.3"):
        other = compose("train", ["plan=best", "model=decoder/llama/tiny", f"hydra.searchpath=[{tmp_path / 'best'}]"])
    assert other.model.d_model == 192  # a model that is named is the one that is trained
    assert other.plan == composed.plan


def test_the_command_trains_the_best_plan(
    seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(seeds), "--out", "answer"]) == 0
    shown = capfd.readouterr().out
    command = next(line for line in shown.splitlines() if "control=true" in line).split()
    assert command[:6] == ["raygrow", "train", "--config-dir", "answer/best", "plan=best", "seed=3"]
    assert main([*command[1:], "dry_run=true"]) == 0
    run, _, _ = capfd.readouterr().out.partition("\n\n")
    tree = yaml.safe_load(run.partition("phase ")[0])
    assert (tree["seed"], tree["control"], tree["name"]) == (3, True, "timing-best-seed3")
    assert tree["plan"]["phases"]["base"]["share"] == BEST_SHARE


def test_a_search_that_has_moved_is_still_read(tmp_path: Path):
    rows = [row | {"folder": f"/gone/{row['folder']}"} for row in [write_trial(tmp_path, share=0.05)]]
    (trial,) = load_search([write_search(tmp_path, rows)]).trials
    assert trial.run is not None


def test_damage_and_mixtures_are_named(seeds: Path, tmp_path: Path):
    run = write_run(tmp_path / "run", grown=True, ease=1.0)
    with pytest.raises(ValueError, match=r"is a search and .*run is none"):
        write_report([seeds, run], tmp_path)
    broken = write_search(tmp_path / "broken", [])
    for content in (b"[{", json.dumps([{"name": "x"}]).encode(), b"[1]", b"\xff"):
        (broken / "results.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken/results\.json is damaged"):
            write_report([broken], tmp_path)


@pytest.mark.parametrize(
    ("key", "values", "across", "names"),
    [
        ("train.optimizer.lr", (1e-3, 2e-3), "lr", ()),
        ("plan.phases.stacked.optimizer_state", ("copy", "drop"), "optimizer_state", ("copy", "drop")),
    ],
)
def test_a_search_of_something_else_than_timing(tmp_path: Path, key: str, values: tuple, across: str, names: tuple):
    rows = [write_trial(tmp_path, share=0.05, values={key: value}) for value in values]
    (contest,) = load_search([write_search(tmp_path, rows)]).contests
    placed = layout(contest)
    assert (placed.label, placed.names, placed.is_share) == (across, names, False)
    assert write_report([tmp_path], tmp_path).read_text().count("<svg") == 1


def test_short_names_tell_keys_apart():
    keys = ["plan.phases.base.share", "plan.phases.middle.share", "seed"]
    assert list(short_names(keys).values()) == ["base.share", "middle.share", "seed"]
