"""What the report of a search says: the best setting, what it saves, how sure that is, and the formula refitted."""

import shlex
from pathlib import Path

from raygrow.growth.timing import PUBLISHED
from raygrow.report import units
from raygrow.report.best_plan import BEST, FORMULA
from raygrow.report.compare import TIE
from raygrow.report.estimate import interval, percents
from raygrow.report.search import Contest, Search, Setting
from raygrow.report.search_plots import TIMING, shown
from raygrow.report.search_savings import decayed_speedup, gain, speedup
from raygrow.report.search_tables import BUDGETS, contest_table, many, refit_tables, trials_table, unfinished
from raygrow.report.summary import Summary
from raygrow.report.tables import settings_table


def summarize_search(search: Search, out: Path) -> Summary:
    """The verdict and the tables of a search.

    Args:
        search: As `load_search` gives it.
        out: Where the report goes, with the best plan beside it.
    """
    contest = search.contest
    best = contest.best if contest else None
    tables = [
        *(contest_table(each, several=len(search.contests) > 1) for each in reversed(search.contests)),
        *refit_tables(search),
        trials_table(search),
    ]
    control = contest.control if contest else None
    runs = [next(iter(setting.finished.values())).run for setting in (best, control) if setting]
    return Summary(
        title=search.name,
        headline=_headline(contest, best),
        outcome=_outcome(contest, best),
        sentences=[*(_answer(search, contest, best) if contest and best else []), *_left_out(search), *_spent(search)],
        tables=[table for table in tables if table.rows],
        settings=settings_table([run for run in runs if run]),
        commands=commands(search, out) if best else [],
    )


def commands(search: Search, out: Path) -> list[str]:
    """How to train the best plan, and how to test it and the formula's on a seed that the search has not used."""
    folder = out.resolve() / BEST
    shown_folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    command = f"raygrow train --config-dir {shlex.quote(str(shown_folder))}"
    seeds = [trial.seed for trial in search.trials if isinstance(trial.seed, int)]
    unused = max(seeds, default=0) + 1
    best, formula = (shlex.quote(f"{plan_name(search, plan)}-seed{unused}") for plan in (BEST, FORMULA))
    found = [f"{command} plan={BEST}", f"{command} plan={BEST} seed={unused} control=true name={best}"]
    return [*found, f"{command} plan={FORMULA} seed={unused} name={formula}"] if search.formula_trial else found


def plan_name(search: Search, plan: str) -> str:
    """What a run of the best plan, or of the formula's, is called."""
    return f"{search.folders[0].name}-{plan}"


def describe(setting: Setting, contest: Contest) -> str:
    """A setting in words."""
    names = units.short_names(list(setting.values))
    values = [f"{names[key]} {shown(value)}" for key, value in setting.values.items() if key not in BUDGETS]
    share = contest.share(setting)
    if share is not None and not any(key.endswith(TIMING) for key in setting.values):
        values.append(f"grown after {units.percent(share)} of the FLOPs")
    return ", ".join(values) or "the only setting"


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
        return [f"The formula's timing has no loss to compare with: {unfinished(formula_setting)}."]
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
            "The best setting has ONE SEED, which says nothing about noise: add seed: {grid: [0, 1, 2]} to the space "
            "for intervals."
        )
    near = [setting for setting in contest.grown if setting is not best and not _clearly_better(best, setting)]
    if near:
        said.append(f"Not clearly worse: {many(len(near), 'other setting')}. Which of them is best is open.")
    if contest.at_edge(best):
        said.append("No timing was tried on the other side of the best one: the true best may lie beyond it.")
    if len(contest.grown) > 1:
        said.append(
            f"The best of {len(contest.grown)} settings is partly luck. The commands below with a seed test it on one "
            "that the search has not used."
        )
    return said


def _refitted(search: Search) -> list[str]:
    fit = search.fit()
    if fit is None or len(fit.fitted) == len(PUBLISHED):
        return []
    kept = [name for name in PUBLISHED if name not in fit.fitted]
    return [
        f"The formula refitted: {many(fit.points, 'best timing')} cannot determine {' and '.join(kept)}, which "
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
        (ends.count("in progress"), "is in progress, or stopped early", "are in progress, or stopped early"),
    ]
    counts = [f"{count} {one if count == 1 else more}" for count, one, more in others if count]
    return [f"Of {many(len(ends), 'trial')}, {' and '.join(counts)}."] if counts else []


def _spent(search: Search) -> list[str]:
    """What the search cost, and what it would have cost to try everything."""
    cost = search.cost
    if cost is None or not cost.alone:
        return []
    return [
        f"The search spent {units.flops(cost.spent)} FLOPs, counted as they were trained: "
        f"{units.percent(cost.spent / cost.alone)} of the {units.flops(cost.alone)} that its trials would have taken "
        f"alone, each to its end. With shared work, but none stopped early, it would have been "
        f"{units.flops(cost.shared)}."
    ]
