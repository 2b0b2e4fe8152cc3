"""What does it cost a search that trials hold their place while they wait for what another one trains?

    python benchmarks/search_waiting.py      counts, and trains nothing

Simulates the searches of `tune_spaces/` on places that all train at one speed: trials run to their end, a state is
there as soon as training has passed it, and starting costs nothing. Compared are trials in the order in which the space
lists them, in the order in which a search begins them, and in that order where a trial that would wait gives up its
place to one that need not. The time is in units of what no order can beat: all FLOPs shared out evenly, or the longest
trial.
"""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write_results
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from raygrow.config import build
from raygrow.data.shards import MANIFEST_FILE
from raygrow.runtime.choosing import chooser
from raygrow.space import SpaceConfig
from raygrow.train.shared import Segment, segments, total_flops
from raygrow.trials import Search

SPACES = {"growth_timing": 5e7, "growth_factor": 5e7, "growth_budget": 2e7}
"""Budgets in tokens at which bases are longer than their warmup, so that there is something to share."""
PLACES = (2, 4, 8, 16)
TICKS = 4000
"""Of the longest trial."""


def main() -> None:
    """Prints and writes a row for every space and number of places."""
    rows = [row(name, tokens, places) for name, tokens in SPACES.items() for places in PLACES]
    for found in rows:
        print(found)
    print(write_results("search_waiting", {"rows": rows}))


def row(name: str, tokens: float, places: int) -> dict[str, Any]:
    """One search, in three ways: (time, share of the places' time that is spent waiting)."""
    listed, begun = trials(name, tokens)
    longest = max(sum(segment.flops for segment in trial) for trial in listed)
    least = max(total_flops(listed) / places, longest)
    ways = {
        "as listed": simulate(listed, places, longest / TICKS),
        "as begun": simulate(begun, places, longest / TICKS),
        "giving up places": simulate(begun, places, longest / TICKS, yields=True),
    }
    found: dict[str, Any] = {"space": name, "trials": len(listed), "places": places}
    return found | {
        way: (round(time / least, 3), round(held / (places * time), 3)) for way, (time, held) in ways.items()
    }


def trials(name: str, tokens: float) -> tuple[list[tuple[Segment, ...]], list[tuple[Segment, ...]]]:
    """Trials of a space as segments: as the space lists them, and as a search begins them."""
    OmegaConf.register_new_resolver("last", lambda path: str(path).rsplit("/")[-1], replace=True)
    with initialize_config_module("raygrow.conf", version_base="1.3"):
        composed = compose("tune", [f"space={name}", f"plan.tokens={tokens}", "name=waiting"])
    tree: Any = OmegaConf.to_container(composed, resolve=True)
    search = Search(tree, build(SpaceConfig, tree.pop("space"), "space"))
    with tempfile.TemporaryDirectory() as data:
        (Path(data) / MANIFEST_FILE).touch()
        cut = {t.name: segments(t.phases, t.run.train, data=Path(data), seed=t.run.seed) for t in search.fixed}
    points = chooser(search)
    return list(cut.values()), [cut[points.suggest(str(number))["name"]] for number in range(len(cut))]  # pyright: ignore[reportArgumentType, reportCallIssue, reportOptionalSubscript]


def simulate(
    trials: Sequence[tuple[Segment, ...]], places: int, tick: float, *, yields: bool = False
) -> tuple[float, float]:
    """Runs a search; each place trains one FLOP in a unit of time.

    Args:
        trials: In the order in which they begin.
        places: How many there is room for.
        tick: Shortest time that is looked at.
        yields: Whether a trial that would wait gives up its place to one that need not.

    Returns:
        The time until all have ended, and the time that places were held by waiting trials.
    """
    queue, at_work, done, time, waited = list(trials), [], defaultdict(float), 0.0, 0.0

    def next_of(trial: tuple[Segment, ...]) -> Segment | None:
        return next((segment for segment in trial if done[segment.key] < segment.flops), None)

    while True:
        at_work = [trial for trial in at_work if next_of(trial)]
        at_work += [queue.pop(0) for _ in range(min(places - len(at_work), len(queue)))]
        if not at_work:
            return time, waited
        training: dict[str, tuple[Segment, ...]] = {}
        waiting = []
        for trial in [*at_work, *queue] if yields else at_work:
            segment = next_of(trial)
            if segment and segment.key not in training and len(training) < places:
                training[segment.key] = trial
            elif segment and trial in at_work:
                waiting.append(trial)
        for key, trial in training.items():
            segment = next_of(trial)
            done[key] = min(done[key] + tick, segment.flops) if segment else done[key]
        if yields:
            taken = list(training.values())
            held = taken + waiting[: places - len(taken)]
            queue = [trial for trial in [*at_work, *queue] if trial not in held]
            at_work, waiting = held, waiting[: places - len(taken)]
        time += tick
        waited += tick * len(waiting)


if __name__ == "__main__":
    main()
