"""The run's record while it runs: one actor that workers tell their metrics to and the driver asks for news.

Metrics do not go through `ray.train.report`: Ray Train takes one report from each worker per poll (2 s), which would
hold up short steps. Checkpoints do.
"""

import json
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.utils.tensorboard import SummaryWriter

from raygrow.runtime.run_folder import RunFolder

FILE = "history.jsonl"


@ray.remote(num_cpus=0)
class History:
    """Keeps `history.jsonl`, the TensorBoard curves and the growth records of one run.

    Lives on the driver's node and is the only writer of those files.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lines = folder.read_history()
        self._stop = False
        self._news: list[str] = []
        local = folder.local
        self._board = SummaryWriter(str(local / "tensorboard")) if local else None

    def append(self, record: dict[str, Any]) -> bool:
        """Adds a line; returns whether the run is asked to stop."""
        self._lines.append(record)
        local = self._folder.local
        if local:
            with (local / FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._write_all()
        for name, value in record.items():
            if self._board and name not in ("phase", "tokens") and value is not None:
                self._board.add_scalar(name, value, record["tokens"])
        return self._stop

    def rewind(self, phase: str, step: int) -> None:
        """Drops the lines of `phase` after `step`: those steps are about to be run again."""
        kept = [line for line in self._lines if line["phase"] != phase or line["step"] <= step]
        if len(kept) < len(self._lines):
            self._lines = kept
            self._write_all()
        if step:
            self._news.append(f"{phase}: going on from the checkpoint of step {step}")

    def save_verification(self, phase: str, verification: dict[str, Any]) -> None:
        """Writes growth/<phase>.json."""
        self._folder.write(f"growth/{phase}.json", json.dumps(verification, indent=2))
        self._news.append(
            f"{phase}: grown, loss {verification['loss_before']:.4f} -> {verification['loss_after']:.4f}, "
            f"{'verified' if verification['passed'] else 'verification FAILED'}"
        )

    def request_stop(self) -> None:
        """Asks training to save a checkpoint and stop."""
        self._stop = True

    def news(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest line, and what has happened since the last call."""
        news, self._news = self._news, []
        return (self._lines[-1] if self._lines else None), news

    def close(self) -> None:
        """Brings everything to disk."""
        if self._board:
            self._board.close()

    def _write_all(self) -> None:
        self._folder.write(FILE, "".join(json.dumps(line) + "\n" for line in self._lines))


def open_history(folder: RunFolder) -> ActorHandle:
    """Starts the run's history actor beside the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return History.options(scheduling_strategy=here).remote(folder)  # pyright: ignore[reportReturnType]
