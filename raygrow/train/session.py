"""What training needs from whatever runs it: where to resume, where to save, whom to tell. Ray gives one; tests too."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""One line of history: metric name -> number, phase name."""


DONE = "DONE"
"""Marker file of a whole checkpoint."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint; names sort as their steps do."""
    return f"step-{step:08d}"


class Session(Protocol):
    """One worker's link to its run. Calls marked (all) are made by every worker, in the same order."""

    def resume_from(self) -> Path | None:
        """This phase's newest checkpoint, or None at a fresh start."""
        ...

    def checkpoint_folder(self, step: int) -> Path:
        """Where to write the checkpoint of a step. (all)"""
        ...

    def commit(self, folder: Path, step: int) -> None:
        """The checkpoint is whole: make it the one to resume from. (all)"""
        ...

    def log(self, record: Record) -> None:
        """One line of history. Called by rank 0."""
        ...

    def warn(self, text: str) -> None:
        """Something that people should know, though training goes on. Called by rank 0."""
        ...

    def rewind(self, step: int) -> None:
        """Forget all of this phase after `step`, which is about to be run again. Called by rank 0, before any save."""
        ...

    def save_verification(self, verification: Record) -> None:
        """The outcome of a growth. Called by rank 0."""
        ...

    def stop_requested(self) -> bool:
        """Whether someone asked the run to save and stop."""
        ...


class FolderSession:
    """A session in a plain folder, for running a phase without Ray (torchrun, tests)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.history = folder / "history.jsonl"

    def resume_from(self) -> Path | None:
        """The newest folder that was committed."""
        done = sorted(self.folder.glob(f"step-*/{DONE}"))
        return done[-1].parent if done else None

    def checkpoint_folder(self, step: int) -> Path:
        """`step-<step>` in the session's folder."""
        return self.folder / checkpoint_name(step)

    def commit(self, folder: Path, step: int) -> None:
        """Leaves a DONE marker."""
        (folder / DONE).touch()

    def log(self, record: Record) -> None:
        """Appends to history.jsonl."""
        with self.history.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """History so far."""
        return [json.loads(line) for line in self.history.read_text().splitlines()] if self.history.exists() else []

    def warn(self, text: str) -> None:
        """Leaves it to the log."""
        logger.warning(text)

    def rewind(self, step: int) -> None:
        """Drops later lines."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.history.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save_verification(self, verification: Record) -> None:
        """Writes growth.json."""
        (self.folder / "growth.json").write_text(json.dumps(verification, indent=2))

    def stop_requested(self) -> bool:
        """When a file named STOP appears."""
        return (self.folder / "STOP").exists()
