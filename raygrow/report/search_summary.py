"""What the report of a search says: the best setting, what it saves, how sure that is, and the formula refitted."""

import math
import shlex
from pathlib import Path

from raygrow.growth.timing import PUBLISHED, TimingFit, formula
from raygrow.report import units
from raygrow.report.best_plan import BEST
from raygrow.report.compare import TIE
from raygrow.report.search import (
    Contest,
    Estimate,
    Search,
    Setting,
    decayed_speedup,
    gain,
    speedup,
    timing_point,
)
from raygrow.report.search_plots import TIMING, short_names, shown
from raygrow.report.summary import Summary, Table, settings_table, without_empty_columns

MEANINGS = {"a": "slope of log10 N", "b": "slope of 1 / log10 C", "c": "constant"}

BUDGETS = ("plan.tokens", "plan.flops")
"""Keys that all settings of a contest have alike."""


def summarize_search(search: Search, out: Path) -> Summary:
    """The verdict and the tables of a search.

    Args:
        search: As `load_search` gives it.
        out: Where the report goes, with the best plan beside it.
    """
    contest = search.contest
    best = contest.best if contest else None
    tables = [
        *(settings_of(each, several=len(search.contests) > 1) for each in reversed(search.contests)),
        *refit_tables(search),
        trials_table(search),
    ]
    control = contest.control if contest else None
    runs = [next(iter(setting.finished.values())).run for setting in (best, control) if setting]
    return Summary(
        title=search.name,
        headline=_headline(contest, best),
        outcome=_outcome(contest, best),
        sentences=[*_answer(search, contest, best), *_left_out(search)] if contest and best else _left_out(search),
        tables=[table for table in tables if table.rows],
        settings=settings_table([run for run in runs if run]),
        commands=commands(search, best, out) if best else [],
    )


def commands(search: Search, best: Setting, out: Path) -> list[str]:
    """How to train the best plan, and how to test it on a seed that the search has not used."""
    folder = out.resolve() / BEST
    shown_folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    command = f"raygrow train --config-dir {shlex.quote(str(shown_folder))} plan={BEST}"
    seeds = [trial.seed for trial in search.trials if isinstance(trial.seed, int)]
    unused = max(seeds, default=0) + 1
    name = f"{best_name(search)}-seed{unused}"
    return [command, f"{command} seed={unused} control=true name={shlex.quote(name)}"]


def best_name(search: Search) -> str:
    """What a run of the best plan is called."""
    return f"{search.folders[0].name}-{BEST}"


def describe(setting: Setting, contest: Contest) -> str:
    """A setting in words."""
    names = short_names(list(setting.values))
    values = [f"{names[key]} {shown(value)}" for key, value in setting.values.items() if key not in BUDGETS]
    share = contest.share(setting)
    if share is not None and not any(key.endswith(TIMING) for key in setting.values):
        values.append(f"grown after {units.percent(share)} of the FLOPs")
    return ", ".join(values) or "the only setting"


def settings_of(contest: Contest, *, several: bool = False) -> Table:
    """One row per setting: its values, its loss, and what it saves."""
    finished, control = contest.grown, contest.control
    scratch = [s for s in contest.settings if s.is_control]
    open_ones = [s for s in contest.settings if not s.is_control and s not in finished]
    keys = list(dict.fromkeys(key for s in contest.settings for key in s.values if key not in BUDGETS))
    names = short_names(keys)
    rows = []
    for place, setting in enumerate([*finished, *scratch, *open_ones], 1):
        ahead = gain(setting, control) if control and not setting.is_control else None
        faster = speedup(setting, control, of=lambda c: c.reached) if control and not setting.is_control else None
        ends = setting.loss
        rows.append(
            [
                _mark(setting, contest, place),
                *(shown(setting.values[key]) if key in setting.values else units.DASH for key in keys),
                units.percent(contest.share(setting)),
                interval(ends) if ends else _unfinished(setting),
                str(len(setting.finished)),
                units.flops(setting.flops),
                interval(ahead, signed=True),
                percents(faster),
            ]
        )
    header = ["", *(names[key] for key in keys), "base", "val loss", "seeds", "FLOPs", "nats gained", "speedup"]
    title = f"Settings, at {units.flops(contest.flops)} FLOPs" if several else "Settings"
    note = (
        "Mean over seeds, with its 95 % interval where there are several. Base: its share of the FLOPs. Nats gained "
        "over scratch at equal FLOPs and speedup = FLOPs from scratch / FLOPs grown - 1 at the loss that both reached, "
        "seed by seed. A run that passes a loss before its learning rate has decayed would have passed it earlier, had "
        "it been planned to end there."
    )
    return without_empty_columns(Table(title=title, header=header, rows=rows, note=note))


def refit_tables(search: Search) -> list[Table]:
    """The formula's constants from the best timings, and what each version says of each budget."""
    fit = search.fit()
    if fit is None:
        return []
    constants = [
        [
            f"{name}, {MEANINGS[name]}",
            f"{PUBLISHED[name]:g}",
            f"{fit.constants[name]:.4g}",
            f"± {fit.errors[name]:.2g}" if name in fit.errors else units.DASH,
            "fitted" if name in fit.fitted else "as published: not determined",
        ]
        for name in PUBLISHED
    ]
    header = ["constant", "published", "here", "standard error", ""]
    refit = without_empty_columns(
        Table(title="The timing formula, refitted", header=header, rows=constants, note=" ".join(honest(fit, search)))
    )
    rows = [
        [
            units.count(point.params),
            units.flops(point.flops),
            units.count(point.base_tokens),
            units.count(formula(point.params, point.flops)),
            units.count(fit.base_tokens(point.params, point.flops)),
        ]
        for contest in search.contests
        if (point := timing_point(contest))
    ]
    header = ["N", "C = 6 N D", "best base tokens", "published formula", "refitted"]
    return [refit, Table(title="Best timings", header=header, rows=rows)]


def honest(fit: TimingFit, search: Search) -> list[str]:
    """What the points can and cannot say about the constants."""
    edges = sum(contest.at_edge(contest.best) for contest in search.contests if contest.best)
    said = [
        "log10(d) = a log10(N) + b / log10(C) + c: d tokens of the base, N parameters of the target's Blocks, "
        f"C = 6 N D FLOPs. Fitted to {_many(fit.points, 'best timing')}: "
        f"{_many(fit.rank, 'independent equation')} for the three constants."
    ]
    if len(fit.fitted) < len(PUBLISHED):
        said.append(
            "For all three, search several targets and several budgets of each, and give `raygrow report` the folders "
            "of all searches together."
        )
    if math.isfinite(fit.condition):
        said.append(f"Condition number of the two slopes: {fit.condition:.3g}; 1 is best.")
    if not fit.errors:
        said.append("With as many constants as points the fit goes through every point, and says nothing about noise.")
    else:
        said.append(f"The worst point is a factor of {fit.largest_error:.2f} off the fit.")
    if edges:
        said.append(f"{edges} of the best timings had no other tried on one side, and may lie further out.")
    return said


def trials_table(search: Search) -> Table:
    """Every trial as it ended."""
    keys = list(dict.fromkeys(key for trial in search.trials for key in trial.values))
    names = short_names(keys)
    rows = [
        [
            trial.name,
            trial.status,
            *(shown(trial.values[key]) if key in trial.values else units.DASH for key in keys),
            units.number(trial.val_loss),
            units.flops(trial.flops),
            units.duration(trial.run.last("seconds") if trial.run else None),
        ]
        for trial in search.trials
    ]
    header = ["trial", "status", *(names[key] for key in keys), "val loss", "FLOPs", "time"]
    note = "Time is that of the trial were it trained alone: what several trials share was trained once."
    return without_empty_columns(Table(title="Trials", header=header, rows=rows, note=note))


def interval(value: Estimate | None, *, signed: bool = False) -> str:
    """A mean and the half of its interval: `1.234 ± 0.005`."""
    if value is None:
        return units.DASH
    mean = f"{value.mean:{'+' if signed else ''}.3f}"
    return mean if value.half is None else f"{mean} ± {value.half:.3f}"


def percents(value: Estimate | None) -> str:
    """The same of a share, in percent."""
    if value is None:
        return units.DASH
    mean = units.percent(value.mean, signed=True)
    return mean if value.half is None else f"{mean} ± {units.percent(value.half)}"


def _headline(contest: Contest | None, best: Setting | None) -> str:
    if contest is None or best is None:
        return "No grown trial has finished yet"
    lead = {"won": "Growth won", "lost": "Growth lost", "tied": "No clear difference", "open": "The best of the search"}
    return f"{lead[_outcome(contest, best)]}: {describe(best, contest)}"


def _outcome(contest: Contest | None, best: Setting | None) -> str:
    """With seeds enough, whether the interval leaves out zero; with one, whether the gain is more than a tie."""
    ahead = gain(best, contest.control) if contest and best and contest.control else None
    if ahead is None:
        return "open"
    doubt = TIE if ahead.half is None else ahead.half
    return "tied" if abs(ahead.mean) < doubt else "won" if ahead.mean > 0 else "lost"


def _answer(search: Search, contest: Contest, best: Setting) -> list[str]:
    """The best setting against scratch and the formula, and what makes it doubtful."""
    assert best.loss is not None
    said = [
        f"At equal compute ({units.flops(contest.flops)} FLOPs, the base model's included) the lowest validation loss "
        f"is {interval(best.loss)}, {describe(best, contest)}."
    ]
    control = contest.control
    if control is None:
        said.append("There is no trial from scratch to compare with: control: true in the space trains one.")
    else:
        said += _against(control, best, contest, search)
    said += _against_formula(contest, best)
    return [*said, *_doubts(contest, best), *_refitted(search)]


def _against(control: Setting, best: Setting, contest: Contest, search: Search) -> list[str]:
    said = []
    ahead = gain(best, control)
    if ahead is not None and control.loss is not None:
        said.append(f"From scratch it is {interval(control.loss)}: {interval(ahead, signed=True)} nats gained.")
    faster = speedup(best, control, of=lambda c: c.reached)
    if faster is not None:
        in_time = speedup(best, control, of=lambda c: c.reached_seconds)
        said.append(
            f"Speedup at the loss that both reached: {percents(faster)} in FLOPs, {percents(in_time)} in training time."
        )
    decayed = decayed_speedup([c for c in search.contests if c.model.regrouped(1) == contest.model.regrouped(1)])
    if decayed is not None:
        said.append(
            f"Between runs that each end their own budget with a decayed learning rate: {percents(decayed)} in FLOPs."
        )
    return said


def _against_formula(contest: Contest, best: Setting) -> list[str]:
    formula_setting = contest.formula
    if formula_setting is None:
        return []
    if formula_setting is best:
        return ["The best timing is the formula's."]
    behind = gain(best, formula_setting)
    if behind is None:
        return [f"The formula's timing has no loss to compare with: {_unfinished(formula_setting)}."]
    return [
        "The published formula's timing, clamped where it asks for too large a base, is "
        f"{interval(behind, signed=True)} nats behind ({describe(formula_setting, contest)})."
    ]


def _doubts(contest: Contest, best: Setting) -> list[str]:
    """What the reader should know before trusting the best setting."""
    loss = best.loss
    assert loss is not None
    said = []
    if loss.half is None:
        said.append(
            "Each figure is from ONE SEED, which says nothing about noise: add seed: {grid: [0, 1, 2]} to the space "
            "for intervals."
        )
    near = [setting for setting in contest.grown if setting is not best and not _clearly_better(best, setting)]
    if near:
        said.append(f"Not clearly worse: {_many(len(near), 'other setting')}. Which of them is best is open.")
    if contest.at_edge(best):
        said.append("No timing was tried on the other side of the best one: the true best may lie beyond it.")
    if len(contest.grown) > 1:
        said.append(
            f"The best of {len(contest.grown)} settings is partly luck. The last command below tests it on a seed that "
            "the search has not used."
        )
    return said


def _refitted(search: Search) -> list[str]:
    fit = search.fit()
    if fit is None or len(fit.fitted) == len(PUBLISHED):
        return []
    kept = [name for name in PUBLISHED if name not in fit.fitted]
    return [
        f"The formula refitted: {_many(fit.points, 'best timing')} cannot determine {' and '.join(kept)}, which "
        f"{'stays' if len(kept) == 1 else 'stay'} as published. Do not use the fit far from what was searched."
    ]


def _clearly_better(best: Setting, other: Setting) -> bool:
    """Whether the interval of the difference, seed by seed, leaves out zero; of one seed, whether it is no tie."""
    ahead = gain(best, other)
    return ahead is not None and ahead.mean > (TIE if ahead.half is None else ahead.half)


def _left_out(search: Search) -> list[str]:
    """What came of the trials without a part in the answer."""
    if not search.trials:
        return ["No trial has begun yet."]
    ends = [trial.status for trial in search.trials]
    others = [
        (ends.count("stopped"), "was stopped early as hopeless", "were stopped early as hopeless"),
        (ends.count("failed"), "failed", "failed"),
        (ends.count("in progress"), "is in progress", "are in progress"),
    ]
    counts = [f"{count} {one if count == 1 else more}" for count, one, more in others if count]
    return [f"Of {_many(len(ends), 'trial')}, {' and '.join(counts)}."] if counts else []


def _mark(setting: Setting, contest: Contest, place: int) -> str:
    """What the row of a setting is called."""
    roles = [
        (setting is contest.best, "best"),
        (setting.is_formula, "formula"),
        (setting.is_control, "scratch"),
    ]
    return ", ".join(name for holds, name in roles if holds) or str(place)


def _unfinished(setting: Setting) -> str:
    """How a setting without a final loss ended."""
    return ", ".join(dict.fromkeys(trial.status for trial in setting.trials))


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
