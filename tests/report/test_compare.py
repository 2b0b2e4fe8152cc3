"""The verdict on curves small enough to work out by hand."""

from pathlib import Path

import numpy as np
import pytest

from raygrow.report.compare import Curve, compare, crossing, fair, headline, sentences
from raygrow.report.runs import Run


def curve(*points: tuple[float, float]) -> Curve:
    cost, loss = zip(*points, strict=True)
    return Curve(np.array(cost, dtype=float), np.array(loss, dtype=float))


def run(name: str, *points: tuple[float, float], status: str = "finished") -> Run:
    """A run whose history is `(flops, validation loss)`; a second costs 10 FLOPs."""
    lines = [
        {"phase": "p", "step": i, "tokens": flops, "flops": flops, "seconds": flops / 10, "val_loss": loss}
        for i, (flops, loss) in enumerate(points)
    ]
    return Run(name=name, path=Path(name), settings={}, history=lines, growths={}, summary={"status": status})


def test_reach_interpolates_between_evaluations():
    falling = curve((100, 4.0), (200, 3.0), (300, 2.8))
    assert falling.reach(3.5) == pytest.approx(150)
    assert falling.reach(2.9) == pytest.approx(250)
    assert falling.reach(2.8) == 300
    assert falling.reach(2.79) is None
    assert falling.reach(5.0) == 100  # already there at the first evaluation


def test_reach_takes_the_best_so_far_where_the_loss_rises():
    noisy = curve((100, 3.0), (200, 3.4), (300, 2.6))  # growth at 200 raises the loss
    assert noisy.reach(3.0) == 100
    assert noisy.reach(2.8) == pytest.approx(250)


def test_growth_wins():
    verdict = compare(run("g", (100, 3.0), (200, 2.0), (300, 1.8)), run("s", (100, 4.0), (300, 2.0)))
    assert verdict is not None
    assert (verdict.outcome, headline([verdict])) == ("won", "Growth won")
    assert verdict.gain == pytest.approx(0.2)
    assert verdict.reached.loss == 2.0
    assert verdict.reached.speedup == pytest.approx(300 / 200 - 1)
    assert verdict.reached_seconds.speedup == pytest.approx(0.5)
    assert (verdict.beyond.grown, verdict.beyond.scratch, verdict.beyond.speedup) == (300, None, None)
    assert any("+50.0 %" in sentence for sentence in sentences(verdict))
    assert any("1.800 was never reached from scratch" in sentence for sentence in sentences(verdict))


def test_scratch_wins():
    verdict = compare(run("g", (100, 4.0), (300, 2.0)), run("s", (100, 3.0), (200, 2.0), (300, 1.8)))
    assert verdict is not None
    assert headline([verdict]) == "Growth lost"
    assert verdict.reached.speedup == pytest.approx(200 / 300 - 1)
    assert verdict.beyond.grown is None
    assert any("higher with growth" in sentence for sentence in sentences(verdict))
    assert any("never reached with growth" in sentence for sentence in sentences(verdict))


def test_a_longer_scratch_run_gives_the_speedup_at_the_grown_loss():
    verdict = compare(run("g", (100, 3.0), (300, 1.8)), run("s", (100, 4.0), (300, 2.0), (400, 1.8), (500, 1.7)))
    assert verdict is not None
    assert verdict.flops == 300
    assert verdict.outcome == "won"
    assert not verdict.equal_budgets
    assert verdict.reached.speedup == pytest.approx(400 / 300 - 1)
    assert any("budgets differ" in sentence for sentence in sentences(verdict))


def test_a_difference_of_noise_is_called_none():
    verdict = compare(run("g", (100, 3.0), (300, 2.008)), run("s", (100, 3.0), (300, 2.0)))
    assert verdict is not None
    assert headline([verdict]) == "No clear difference"


def test_a_run_in_progress_has_no_last_word():
    verdict = compare(run("g", (100, 3.0), status="in progress"), run("s", (100, 4.0), (300, 2.0)))
    assert verdict is not None
    assert headline([verdict]) == "Growth is ahead so far"
    assert compare(run("g"), run("s", (100, 4.0))) is None


def test_a_diverged_evaluation_is_left_out():
    verdict = compare(run("g", (100, 3.0), (300, float("nan")), status="failed"), run("s", (100, 4.0), (300, 2.0)))
    assert verdict is not None
    assert (verdict.flops, verdict.grown_loss, verdict.finished) == (100, 3.0, False)


def test_curves_that_never_meet():
    apart = crossing(curve((100, 2.0), (200, 1.5)), curve((100, 9.0), (200, 8.0)), 1.5)
    assert (apart.grown, apart.scratch, apart.speedup) == (200, None, None)


def test_of_several_runs_the_winners_are_counted_at_equal_budgets():
    scratch, longer = run("s", (100, 4.0), (300, 2.0)), run("l", (100, 4.0), (500, 1.7))
    better, worse = run("g", (100, 3.0), (300, 1.8)), run("h", (100, 3.0), (300, 2.2))
    pairs = [compare(grown, control) for grown in (better, worse) for control in (scratch, longer)]
    decisive = fair([pair for pair in pairs if pair is not None])
    assert [(c.grown, c.scratch) for c in decisive] == [("g", "s"), ("h", "s")]
    assert headline(decisive) == "Growth won 1 of 2 comparisons"
