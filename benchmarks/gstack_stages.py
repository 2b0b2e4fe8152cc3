"""What `gstack_speedup.py` runs: its searches, and the runs at length that are told what the searches have found."""

from dataclasses import replace
from pathlib import Path

from raygrow.report.search import Contest, Setting, is_search, load_search

DECAY, DECAY_KEY = 0.2, "train.schedule.decay"

GSTACK = ["plan=gstack"]
SCRATCH = ["plan=scratch"]
BASE, STACKED, AGAIN = "plan.phases.base", "plan.phases.stacked", "plan.phases.again"
LATE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=8e-4"]
TWICE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=1.5e-3", f"{STACKED}.growth.factor=2"]
TWICE += [f"{AGAIN}.growth.operator=gstack", f"{AGAIN}.growth.factor=2", f"{AGAIN}.lr=8e-4"]
WIDE = [*GSTACK, f"{BASE}.lr=1.5e-3", f"{STACKED}.lr=1.5e-3", f"{STACKED}.growth.operator=width"]
WIDE += [f"{STACKED}.growth.factor=2", f"{STACKED}.growth.noise_snr_db=10"]
WIDE += [f"{AGAIN}.growth.operator=gstack", f"{AGAIN}.growth.factor=4", f"{AGAIN}.lr=8e-4"]
EARLY, LATER = "plan.tokens=60e6", "plan.tokens=120e6"
SEARCHES = {
    "scratch": [*SCRATCH, EARLY],
    "warmup": [*SCRATCH, EARLY],
    "rates": [*GSTACK, EARLY],
    "growth": [*LATE, LATER],
    "twice": [*TWICE, LATER],
    "wide": [*WIDE, LATER],
}
"""Each a space of the same name in `spaces/`."""
GROWTHS = ("growth", "twice", "wide")
"""Of these, the ways to grow that compete."""
AT_LENGTH = ("long-scratch", "long-grown")
READINGS = {"constant": 0.0, "decayed": DECAY}
BUDGETS = {
    "constant-scratch": "300e6",
    "constant-grown": "220e6",
    "decayed-scratch": "120e6,240e6,300e6",
    "decayed-grown": "160e6,220e6",
}
"""The grown runs end where the control's loss is about reached."""
UNSEEN = ("unseen-grown", "unseen-formula", "unseen-random")
FINALS = (*BUDGETS, *UNSEEN)
LONGER = 190 / 120
"""Of the grown runs' budgets, halfway, to the search's: what comes before the last growth is as much longer."""
SMOKE_BUDGETS = "40e3,50e3"


def _space(**grids: str) -> str:
    """A space of grids: of budgets, decays, seeds, and what is named by its key."""
    keys = {"tokens": "plan.tokens", "decays": DECAY_KEY, "seeds": "seed"}
    axes = (f"{keys.get(name, name)}:{{grid:[{values}]}}" for name, values in grids.items())
    return f"space.space={{{','.join(axes)}}}"


def stage_words(name: str, folder: Path, *, smoke: bool) -> list[str]:
    """What a stage after the search's first ones is told, with what they have found best.

    Raises:
        SystemExit: If they have found nothing yet.
    """
    words = _at_length(name, folder)
    if smoke:
        words += [_space(tokens=SMOKE_BUDGETS), "train.evaluate_every=10"]
    return words


def best_of(contest: Contest) -> list[tuple[float, Setting]]:
    """Settings that have a loss, with it, the lowest first."""
    found = [(loss.mean, setting) for setting in contest.settings if (loss := setting.loss)]
    return sorted(found, key=lambda pair: pair[0])


def with_decay(contest: Contest, decay: float) -> Contest:
    """The settings of a contest that decay alike."""
    return replace(contest, settings=tuple(s for s in contest.settings if s.values[DECAY_KEY] == decay))


def _at_length(name: str, folder: Path) -> list[str]:
    kind, _, arm = name.partition("-")
    if kind == "unseen":
        return [*_unseen(arm, folder), _space(tokens="120e6", decays=str(DECAY), seeds="1")]
    words, rate = ([*SCRATCH], "train.optimizer.lr") if arm == "scratch" else _grown(folder, LONGER)
    words.append("train.evaluate_every=250")
    if kind == "long":
        tokens, rates = ("200e6", "4e-4,6e-4,1e-3") if arm == "scratch" else ("190e6", "5e-4,8e-4,1.2e-3")
        return [*words, _space(tokens=tokens, decays=f"0.0,{DECAY}", seeds="0", **{rate: rates})]
    best = _best_rate(folder / f"long-{arm}", rate, READINGS[kind])
    return [*words, f"{rate}={best}", _space(tokens=BUDGETS[name], decays=str(READINGS[kind]), seeds="1,2,3")]


def _unseen(arm: str, folder: Path) -> list[str]:
    """One way to grow, as the search's budget has it."""
    if arm == "grown":
        return _grown(folder, 1.0)[0]
    if arm == "formula":
        return [*LATE, "space.formula=true", "space.search=optuna", "space.samples=0"]
    return [*LATE, f"{BASE}.share=null", f"{BASE}.steps=1", f"{BASE}.lr=1e-12"]


def _grown(folder: Path, longer: float) -> tuple[list[str], str]:
    """The best of all ways to grow, its budgets before the last growth so many times longer, and what its last learning
    rate is called.
    """
    searches = [(name, load_search([folder / name]).contest) for name in GROWTHS if is_search(folder / name)]
    found = [(*best_of(contest)[0], name, contest) for name, contest in searches if contest]
    if not found:
        raise SystemExit(f"no way to grow has been found in {folder}: run {', '.join(GROWTHS)} first, or one of them")
    _, best, name, contest = min(found, key=lambda item: item[0])
    words = [word for word in SEARCHES[name] if word != LATER]
    for key, value in best.values.items():
        if key.endswith(".share") and longer != 1.0:  # in FLOPs, so that budgets share what comes before
            words += [f"{key}=null", f"{key.removesuffix('share')}flops={value * contest.flops * longer:.4g}"]
        else:
            words.append(f"{key}={value}")
    return words, f"{AGAIN if any(word.startswith(AGAIN) for word in words) else STACKED}.lr"


def _best_rate(folder: Path, key: str, decay: float) -> float:
    """The learning rate at which a search at length ended lowest with that decay."""
    found = best_of(with_decay(load_search([folder]).contests[-1], decay)) if is_search(folder) else []
    if not found:
        raise SystemExit(f"no learning rate has been found in {folder}: run {folder.name} first")
    if key not in found[0][1].values:
        raise SystemExit(f"{folder} has no {key}: it is of another way to grow than what now is best; run it elsewhere")
    return found[0][1].values[key]
