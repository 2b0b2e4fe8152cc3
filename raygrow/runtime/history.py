"""The run's record while it runs: one actor that workers tell their metrics to and the driver asks for news.

Metrics do not go through `ray.train.report`: Ray Train takes one report from each worker per poll (2 s), which would
hold up short steps. Checkpoints do.
"""

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.utils.tensorboard import SummaryWriter

from raygrow.report import units
from raygrow.runtime.run_folder import HISTORY_FILE, RunFolder

CURVES_FOLDER = "tensorboard"


@ray.remote(num_cpus=0)
class History:
    """Keeps `history.jsonl`, the TensorBoard curves and the growth records of one run.

    Lives on the driver's node and is the only writer of those files. Lines that are not on disk yet, because an object
    store takes whole files only or a disk is full, are kept here and written when a checkpoint is committed.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lines = folder.read_history()
        self._is_behind = False
        self._failure: str | None = None
        self._stop = False
        self._news: list[str] = []
        self._board: SummaryWriter | None = None
        self._curves = (
            folder.local / CURVES_FOLDER if folder.local else Path(tempfile.mkdtemp(prefix="raygrow-curves-"))
        )

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        self._lines.append(record)
        try:
            self._append_line(record)
        except OSError:
            self._is_behind = True

    def flush(self) -> None:
        """Brings history.jsonl up to date, if there is room for it."""
        if self._is_behind:
            with suppress(OSError):
                self._write_all()

    def rewind(self, phase: str, step: int) -> None:
        """Drops the lines of `phase` after `step`: those steps are about to be run again.

        Every start of a phase comes here first, which also mends a last line that a crash has cut short.
        """
        self._lines = [line for line in self._lines if line["phase"] != phase or line["step"] <= step]
        self._write_all()
        self._close_board()
        first_step = self._lines[-1]["tokens"] + 1 if self._lines else 0
        self._board = SummaryWriter(str(self._curves), purge_step=first_step)
        if step:
            self._news.append(f"{phase}: going on from the checkpoint of step {step}")

    def save_verification(self, phase: str, verification: dict[str, Any]) -> None:
        """Writes growth/<phase>.json."""
        self._folder.write(f"growth/{phase}.json", json.dumps(verification, indent=2))
        # a loss that is not a number is none there
        before, after = (units.number(verification[key], 4) for key in ("loss_before", "loss_after"))
        found = "verified" if verification["passed"] else "verification FAILED"
        self._news.append(f"{phase}: grown, loss {before} -> {after}, {found}")

    def tell(self, text: str) -> None:
        """Passes something on to whoever follows the run."""
        self._news.append(text)

    def fail(self, reason: str) -> None:
        """Takes down an error that every retry would meet again."""
        self._failure = self._failure or reason

    def failure(self) -> str | None:
        """Why training is not to be tried again, if so."""
        return self._failure

    def request_stop(self) -> None:
        """Asks training to save a checkpoint and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether training was asked to stop."""
        return self._stop

    def news(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest line, and what has happened since the last call."""
        news, self._news = self._news, []
        return (self._lines[-1] if self._lines else None), news

    def close(self) -> list[dict[str, Any]]:
        """Ends the record; returns all lines where the disk does not have them."""
        self.flush()
        self._close_board()
        return self._lines if self._is_behind else []

    def _append_line(self, record: dict[str, Any]) -> None:
        local = self._folder.local
        if self._is_behind or not local:
            self._is_behind = True
        else:
            with (local / HISTORY_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if self._board and name not in ("phase", "tokens") and value is not None:
                self._board.add_scalar(name, value, record["tokens"])

    def _write_all(self) -> None:
        self._folder.write_history(self._lines)
        self._is_behind = False

    def _close_board(self) -> None:
        if not self._board:
            return
        with suppress(OSError):  # curves are a copy of history.jsonl
            self._board.close()
            for file in self._curves.iterdir() if not self._folder.local else ():
                self._folder.upload(file, f"{CURVES_FOLDER}/{file.name}")
        self._board = None


def open_history(folder: RunFolder) -> ActorHandle:
    """Starts the run's history actor beside the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return History.options(scheduling_strategy=here).remote(folder)  # pyright: ignore[reportReturnType]
