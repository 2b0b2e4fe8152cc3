"""The trials of a search: ordinary runs in which some keys have the values that a space offers.

All of them are built and resolved before any starts, so that whatever is wrong with a space is told at once.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raygrow.config import RunConfig, build
from raygrow.data.shards import MANIFEST_FILE
from raygrow.growth.gstack import Gstack
from raygrow.growth.timing import growth_timing
from raygrow.nn.config import ModelConfig
from raygrow.nn.cost import block_parameters
from raygrow.report.search import Cost
from raygrow.report.units import short_names
from raygrow.space import LISTS, SpaceConfig
from raygrow.train.plan import Phase, resolve, scratch_plan
from raygrow.train.schedule import decay_start
from raygrow.train.shared import Segment, segments, spent_flops, total_flops

MOST_CHECKED = 1000
"""Points of a space with ranges that are tried out before the search begins."""
PUBLISHED_FACTOR = 4
"""Of the formula: how many times deeper than its base the target is."""
BUDGETS = ("share", "tokens", "flops", "steps")
"""Of a phase; a plan has `tokens` or `flops`. Either has one, so that a value for one takes the place of another."""
SAME_BUDGET = 0.05
"""Trials whose FLOPs differ by no more than this share have one budget: phases end on whole steps."""


@dataclass(frozen=True)
class Trial:
    """One run of a search."""

    name: str
    values: dict[str, Any]
    """Dotted key -> value, of the keys in which trials differ; a control has no values of phases."""
    run: RunConfig
    phases: tuple[Phase, ...]
    control: bool = False
    """The final model from scratch."""
    formula: bool = False
    """Grown when the published formula says."""

    @property
    def flops(self) -> float:
        """FLOPs of the whole trial, were it trained alone."""
        return sum(phase.flops for phase in self.phases)

    @property
    def grown_at(self) -> float:
        """FLOPs spent before the last growth; 0 where nothing grows."""
        return max((phase.flops_before for phase in self.phases if phase.growth), default=0.0)

    @property
    def decays_at(self) -> float:
        """FLOPs spent before the learning rate of the last phase starts to decay."""
        last = self.phases[-1]
        return last.flops_before + decay_start(last.steps, last.schedule) / last.steps * last.flops

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What it is trained in; its data must be prepared."""
        data = Path(self.run.data.path).resolve()
        return segments(self.phases, self.run.train, data=data, seed=self.run.seed)


class Search:
    """A run's settings and a space over them.

    Args:
        tree: The run's plain tree, as it was composed.
        space: The space.

    Raises:
        ValueError: If a trial of the space could not be trained; names the key and the value.
    """

    def __init__(self, tree: Mapping[str, Any], space: SpaceConfig) -> None:
        self.tree, self.space = dict(tree), space
        self.run: RunConfig = build(RunConfig, self.tree)
        self._short = short_names(list(space.space))
        _check_run(self.run)
        self._check_keys()
        self.fixed = self._fixed()
        """The trials known before the search begins: controls, the formula's, and all of a grid; none twice."""
        self.corners = [*self.fixed, *self._corners()]
        """The fixed trials, and the extremes of what may be chosen."""

    @property
    def samples(self) -> int:
        """Trials that are chosen while the search goes on: those that there are, where lists give fewer."""
        if self.space.search != "optuna":
            return 0
        space = self.space.space.values()
        sizes = [len(_extremes(values)) if set(values) & {*LISTS} else math.inf for values in space]
        if math.prod(sizes) > MOST_CHECKED:
            return self.space.samples
        chosen = {trial.name for trial in self.corners} - {trial.name for trial in self.fixed}
        return min(self.space.samples, len(chosen))

    @property
    def flops(self) -> float:
        """FLOPs of the longest trial."""
        return max(trial.flops for trial in self.corners)

    def trial_of(self, point: Mapping[str, Any]) -> Trial:
        """The trial that Tune was told to run: a fixed one by its `name`, or the one at chosen `values`."""
        if "name" in point:
            return next(trial for trial in self.fixed if trial.name == point["name"])
        return self.trial(point["values"])

    def trial(self, values: Mapping[str, Any]) -> Trial:
        """The trial at a point of the space; where nothing grows by more than 1 it is the control."""
        run, phases = self._resolved(values)
        growths = [phase.growth for phase in phases if phase.growth]
        if growths and all(isinstance(growth, Gstack) and growth.factor == 1 for growth in growths):
            return self.control(values)
        name = self._name("", values)
        return Trial(name, dict(values), replace(run, name=name), phases)

    def control(self, values: Mapping[str, Any]) -> Trial:
        """The control of the trial at a point: the final model from scratch, with what is not of the phases alike.

        What is of the phases stays as the plan has it, so that all points with the same control have the same run.
        """
        own = {key: value for key, value in values.items() if not _is_of_phases(key)}
        run, phases = self._resolved(self._recommended_factors() | own)
        name = self._name("scratch", own)
        run = replace(run, name=name, plan=scratch_plan(phases))
        return Trial(name, own, run, resolve(run.plan, run.model, run.train), control=True)

    def formula(self, values: Mapping[str, Any]) -> Trial:
        """The trial at a point, but grown for the first time when the published formula says.

        Raises:
            ValueError: If the plan's second phase does not grow the model of its first.
        """
        run, phases = self._resolved(values)
        if len(phases) < 2 or not phases[1].growth:
            raise ValueError("space.formula=true: needs a plan whose second phase grows the model of the first")
        base, total = phases[0], sum(phase.flops for phase in phases)
        params = _block_parameters(run.model)
        timing = growth_timing(
            params, total / phases[-1].flops_per_token, factor=round(params / _block_parameters(base.model))
        )
        budget = {"tokens": timing.base_tokens} if timing.follows_fit else {"share": timing.base_share}
        first = replace(run.plan.phases[base.name], **(dict.fromkeys(BUDGETS) | budget))
        plan = replace(run.plan, phases=run.plan.phases | {base.name: first})
        phases = resolve(plan, run.model, run.train)
        own = {key: value for key, value in values.items() if key.rpartition(".")[0] != f"plan.phases.{base.name}"}
        name = self._name("formula", own)
        spent = {"share": phases[0].flops / total, "tokens": phases[0].tokens, "flops": phases[0].flops}
        spent["steps"] = phases[0].steps
        searched = (name for name in spent if f"plan.phases.{base.name}.{name}" in self.space.space)
        unit = next(searched, "share")
        own[f"plan.phases.{base.name}.{unit}"] = float(f"{spent[unit]:.4g}")
        own = {key: own[key] for key in self.space.space if key in own} | own
        return Trial(name, own, replace(run, name=name, plan=plan), phases, formula=True)

    def _resolved(self, values: Mapping[str, Any]) -> tuple[RunConfig, tuple[Phase, ...]]:
        with _told_of(", ".join(f"{key}={value}" for key, value in values.items())):
            run: RunConfig = build(RunConfig, _with_values(self.tree, values))
            return run, resolve(run.plan, run.model, run.train)

    def _fixed(self) -> list[Trial]:
        trials: list[Trial] = []
        for shared in self._shared_values():
            if self.space.control:
                trials.append(self.control(shared))
            if self.space.formula:
                trials.append(self.formula(self._recommended_factors() | shared))
        if self.space.search == "grid":
            trials += map(self.trial, self._points())
        return list({trial.name: trial for trial in trials}.values())

    def _corners(self) -> Iterator[Trial]:
        if self.space.search == "optuna":
            yield from map(self.trial, itertools.islice(self._points(), MOST_CHECKED))

    def _points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the values of lists and the ends of ranges."""
        choices = map(_extremes, self.space.space.values())
        return (dict(zip(self.space.space, point, strict=True)) for point in itertools.product(*choices))

    def _shared_values(self) -> Iterator[dict[str, Any]]:
        """Every combination of listed values outside of the phases; a key with a range keeps the run's own value."""
        space = self.space.space.items()
        listed = {key: _extremes(values) for key, values in space if not _is_of_phases(key) and set(values) & {*LISTS}}
        return (dict(zip(listed, point, strict=True)) for point in itertools.product(*listed.values()))

    def _recommended_factors(self) -> dict[str, Any]:
        """Growth factors as near to the published one as the space has them; in all else a plan stays as written."""
        return {
            key: min(_extremes(values), key=lambda factor: abs(factor - PUBLISHED_FACTOR))
            for key, values in self.space.space.items()
            if key.endswith(".growth.factor")
        }

    def _check_keys(self) -> None:
        for key, values in self.space.space.items():
            parts, phases = key.split("."), self.run.plan.phases
            if parts[:-1] == ["plan"] and not set(values) & {*LISTS}:
                raise ValueError(
                    f"space.space.{key}: trials are held against others of the same budget, so list the budgets: "
                    f"{key}: {{{'grid' if self.space.search == 'grid' else 'choice'}: [...]}}"
                )
            if _is_of_phases(key) and parts[2] not in phases:
                raise ValueError(f"space.space.{key}: the plan has no phase {parts[2]!r}, only {', '.join(phases)}")
            for value in _extremes(values):
                with _told_of(f"space.space.{key}"):
                    build(RunConfig, _with_values(self.tree, {key: value}))
            if parts[0] not in ("plan", "train", "seed"):
                raise ValueError(
                    f"space.space.{key}: all trials of a search have the same model and data; vary keys of the plan "
                    "or of train, or the seed"
                )

    def _name(self, kind: str, values: Mapping[str, Any]) -> str:
        """A folder's name that says what is special about a trial."""
        words = [f"{self._short[key]}-{_whole(value)}" for key, value in values.items()]
        words = [word.replace("/", "-").replace(" ", "") for word in words]
        return "_".join([kind, *words] if kind else words)


def cost(trials: Sequence[Trial], states: Path) -> Cost:
    """What trials have cost, and what they would have.

    Args:
        trials: Those that were run.
        states: Folder of the states that they share.
    """
    shared = total_flops(trial.segments for trial in trials)
    return Cost(spent=spent_flops(states), shared=shared, alone=sum(trial.flops for trial in trials))


def describe(search: Search) -> str:
    """The trials that are known, what they cost, what of it no trial before them has trained, and what that saves."""
    run, trials = search.run, search.fixed
    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / MANIFEST_FILE).touch()  # data need not be prepared to know what is shared
        cut = [segments(t.phases, t.run.train, data=Path(aside), seed=t.run.seed) for t in trials]
    chosen = f", and {search.samples} that Optuna chooses" if search.samples else ""
    lines = [f"{run.name}: {len(trials)} trials{chosen}", ""]
    width = max((len(trial.name) for trial in trials), default=0)
    shared = 0.0
    for count, trial in enumerate(trials, 1):
        before, shared = shared, total_flops(cut[:count])
        steps = ", ".join(f"{phase.name} {phase.steps} steps" for phase in trial.phases)
        own = f"{trial.flops:.3g} FLOPs, {shared - before:.3g} not shared with trials above"
        lines.append(f"  {trial.name:<{width}} {own}   {steps}")
    alone = sum(trial.flops for trial in trials)
    saved = f"{1 - shared / alone:.0%}" if alone else "0%"
    lines += [
        "",
        f"each alone {alone:.4g} FLOPs, with shared work {shared:.4g}: saves {saved}, and stopping early more",
    ]
    return "\n".join(lines)


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    """Says what an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _check_run(run: RunConfig) -> None:
    if run.workers.num != 1 or any(phase.workers not in (None, 1) for phase in run.plan.phases.values()):
        raise ValueError(
            f"workers.num={run.workers.num}: a trial of a search trains in a single process, so set workers.num=1 and "
            "no workers in phases; what there is room for trains side by side"
        )
    if run.control:
        raise ValueError("control=true is for a single run: whether a search has a control is up to space.control")
    if "://" in run.storage_path:
        raise ValueError(
            f"storage_path={run.storage_path}: trials of a search share their work through files, so this must be a "
            "folder that every node sees"
        )
    for name, phase in run.plan.phases.items():
        if phase.save_start or phase.save_end:
            raise ValueError(f"plan.phases.{name}: a search saves no models; leave out save_start and save_end")


def _is_of_phases(key: str) -> bool:
    return key.startswith("plan.phases.")


def _extremes(values: Mapping[str, list[Any]]) -> list[Any]:
    """All values of a list, the two ends of a range."""
    (kind, numbers) = next(iter(values.items()))
    return numbers if kind in LISTS else numbers[:2]


def _with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with values put at their dotted keys."""
    changed = copy.deepcopy(dict(tree))
    for key, value in values.items():
        *parents, last = key.split(".")
        node: Any = changed
        for done, parent in enumerate(parents, 1):
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"{'.'.join(parents[:done])}={node!r}: has no keys below it, so no {key}")
        node[last] = value
        if parents == ["plan"] or (_is_of_phases(key) and len(parents) == 3):
            for other in BUDGETS if last in BUDGETS else ():
                if ".".join((*parents, other)) not in values:
                    node.pop(other, None)
    return changed


def _whole(value: Any) -> Any:
    """Whole numbers without a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _block_parameters(model: ModelConfig) -> int:
    """Parameters outside of the embedding and the head."""
    return sum(block_parameters(model, block) for block in range(model.n_blocks))
