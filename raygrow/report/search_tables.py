"""The tables of a search's report: settings, trials, and the formula refitted."""

import math

from raygrow.growth.timing import PUBLISHED, formula
from raygrow.growth.timing_fit import TimingFit
from raygrow.report import units
from raygrow.report.estimate import interval, percents
from raygrow.report.search import Contest, Search, Setting, timing_point
from raygrow.report.search_plots import shown
from raygrow.report.search_savings import gain, speedup
from raygrow.report.tables import Table, without_empty_columns

MEANINGS = {"a": "slope of log10 N", "b": "slope of 1 / log10 C", "c": "constant"}

BUDGETS = ("plan.tokens", "plan.flops")
"""Keys that all settings of a contest have alike."""


def contest_table(contest: Contest, *, several: bool = False) -> Table:
    """One row per setting: its values, its loss, and what it saves."""
    finished, control = contest.grown, contest.control
    scratch = [s for s in contest.settings if s.is_control]
    open_ones = [s for s in contest.settings if not s.is_control and s not in finished]
    keys = list(dict.fromkeys(key for s in contest.settings for key in s.values if key not in BUDGETS))
    names = units.short_names(keys)
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
                interval(ends) if ends else unfinished(setting),
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
        f"C = 6 N D FLOPs. Fitted to {many(fit.points, 'best timing')}: "
        f"{many(fit.rank, 'independent equation')} for the three constants."
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
    names = units.short_names(keys)
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


def _mark(setting: Setting, contest: Contest, place: int) -> str:
    """What the row of a setting is called."""
    roles = [
        (setting is contest.best, "best"),
        (setting.is_formula, "formula"),
        (setting.is_control, "scratch"),
    ]
    return ", ".join(name for holds, name in roles if holds) or str(place)


def unfinished(setting: Setting) -> str:
    """How a setting without a final loss ended."""
    return ", ".join(dict.fromkeys(trial.status for trial in setting.trials))


def many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
