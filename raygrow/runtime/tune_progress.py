"""What a search says while it runs: a line for every trial that ends."""

from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial
from rich.console import Console

from raygrow.trials import Search


class Told(Callback):
    """Prints how trials go.

    Args:
        search: The search.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._total = len(search.fixed) + search.samples

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial begins, or goes on."""
        self._tell(trials, trial, "begins")

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has ended, early or not."""
        result = trial.last_result
        how = "finished" if result.get("ends") else "stopped early"
        self._tell(trials, trial, f"{how}, val {result.get('val_loss', float('nan')):.4f}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """A trial has failed for good, or is about to be tried again."""
        self._tell(trials, trial, "lost its process or failed")

    def _tell(self, trials: list[TuneTrial], trial: TuneTrial, what: str) -> None:
        ended = sum(other.is_finished() for other in trials)
        line = f"[{ended}/{self._total} ended] {self._search.trial_of(trial.config).name}: {what}"
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
