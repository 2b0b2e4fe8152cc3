"""The growth-timing formula against the authors' table, and what happens outside its range."""

import itertools
import math

import pytest

from raygrow.growth.timing import PUBLISHED, describe, growth_timing
from raygrow.growth.timing_fit import TimingPoint, fit_timing


@pytest.mark.parametrize(
    ("params", "tokens", "base_tokens"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_the_published_table(params, tokens, base_tokens):
    timing = growth_timing(params, tokens)
    assert round(timing.base_tokens, -7) == base_tokens
    assert f"{base_tokens / 1e9:.2f}"[:4] in describe(timing)
    assert timing.follows_fit


def test_inside_the_fitted_range_there_is_nothing_to_say():
    timing = growth_timing(1.1e9, 100e9)
    assert timing.outside_fit == ()
    assert timing.flops == pytest.approx(6.6e20)
    assert timing.base_tokens == pytest.approx(11.44e9, rel=1e-3)
    assert timing.base_share == pytest.approx(11.44e9 / (4 * 100e9), rel=1e-3)
    assert "caution" not in describe(timing)
    assert "proposal" not in describe(timing)


def test_outside_the_fitted_range_it_says_so():
    assert len(growth_timing(7e9, 2e12).outside_fit) == 2
    (only_flops,) = growth_timing(1e9, 1e9).outside_fit
    assert only_flops.startswith("C=6e+18 is below")


def test_a_base_that_would_cost_too_much_gets_a_share_instead():
    timing = growth_timing(25e6, 100e6)
    assert timing.fitted_base_share > 100
    assert timing.base_share == 0.05
    assert timing.base_tokens == pytest.approx(0.05 * 4 * 100e6)
    assert not timing.follows_fit
    assert "5.00% of the FLOPs instead, 20e6 tokens" in describe(timing)
    assert growth_timing(25e6, 100e6, share=0.1).base_tokens == pytest.approx(40e6)


def test_a_larger_factor_makes_the_same_base_tokens_cheaper():
    two, four = growth_timing(1.1e9, 100e9, factor=2), growth_timing(1.1e9, 100e9, factor=4)
    assert two.base_tokens == four.base_tokens
    assert two.base_share == pytest.approx(2 * four.base_share)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"params": 0, "tokens": 1e9}, "params=0"),
        ({"params": 1e9, "tokens": float("inf")}, "tokens=inf"),
        ({"params": 1e9, "tokens": 1e9, "factor": 0}, "factor=0"),
        ({"params": 1e9, "tokens": 1e9, "share": 0.5}, "share=0.5"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        growth_timing(**arguments)


CONSTANTS = {"a": 0.7, "b": 120.0, "c": -3.0}
SIZES = [(n, c) for n in (3e7, 1e8, 1e9) for c in (1e17, 1e18, 1e20)]


def points(pairs, constants=CONSTANTS, noise=(0.0,)):
    a, b, c = (constants[name] for name in "abc")
    return [
        TimingPoint(params=n, flops=flops, base_tokens=10 ** (a * math.log10(n) + b / math.log10(flops) + c + miss))
        for (n, flops), miss in zip(pairs, itertools.cycle(noise))
    ]


def test_a_fit_gets_the_constants_back():
    fit = fit_timing(points(SIZES))
    assert fit.fitted == ("a", "b", "c")
    assert fit.rank == 3
    assert fit.condition == pytest.approx(1)  # every N with every C
    assert fit.constants == pytest.approx(CONSTANTS)
    assert fit.largest_error == pytest.approx(1)
    assert fit.base_tokens(5e8, 1e19) == pytest.approx(points([(5e8, 1e19)])[0].base_tokens)


def test_noise_shows_in_the_standard_errors():
    noise = (0.05, -0.03, 0.02, -0.04)
    fit = fit_timing(points(SIZES, noise=noise))
    for name, value in CONSTANTS.items():
        assert 0 < abs(fit.constants[name] - value) < 4 * fit.errors[name]
    assert 1.02 < fit.largest_error < 1.2


@pytest.mark.parametrize(
    ("pairs", "fitted", "rank"),
    [
        ([(1e8, 1e18)], ("c",), 1),
        ([(1e8, 1e17), (1e8, 1e19)], ("b", "c"), 2),
        ([(1e7, 1e18), (1e8, 1e18), (1e9, 1e18)], ("a", "c"), 2),
        ([(1e7, 1e17), (1e9, 1e20)], ("c",), 2),  # N and C together: either could be the cause
        ([(10 ** (40 / x), 10.0**x) for x in (17, 18, 20)], ("c",), 2),  # log N follows 1 / log C
        ([(1e8, 1e18), (2e8, 4e18), (4e8, 1.6e19)], ("c",), 3),  # nearly so
    ],
)
def test_what_the_points_do_not_determine_stays_as_published(pairs, fitted, rank):
    fit = fit_timing(points(pairs, PUBLISHED, noise=(0.1,)))
    assert fit.fitted == fitted
    assert fit.rank == rank
    assert fit.errors.keys() == (set(fitted) if len(pairs) > len(fitted) else set())
    moved = {name: value for name, value in fit.constants.items() if value != pytest.approx(PUBLISHED[name])}
    assert moved == pytest.approx({"c": PUBLISHED["c"] + 0.1})


def test_a_fit_needs_a_point():
    with pytest.raises(ValueError, match="no points"):
        fit_timing([])
