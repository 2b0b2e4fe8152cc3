"""The stages of a pipeline on disk: each has a folder, and in it a record of what it was started with and gave.

A stage is finished when its record says so. It is then never done again: a setting that would change what it gave is
refused, and so is a record that was made after another run of the stage before it.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raygrow.report.pipeline import RECORD_FILE
from raygrow.runtime.run_folder import differences
from raygrow.weights.atomic import replace_file
from raygrow.weights.json_file import read_json


class Stage:
    """One stage.

    Args:
        name: Of the stage and of its folder.
        root: The pipeline's folder.
        settings: What decides what it gives, as a plain tree.
        completed: Gives such a tree that was taken down by an earlier version the keys that have come since.

    Raises:
        ValueError: If its record is damaged, or holds settings that are gone by now; names it.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        settings: dict[str, Any],
        completed: Callable[[str, dict[str, Any]], dict[str, Any]],
    ) -> None:
        self.name, self.folder = name, root / name
        self._file = self.folder / RECORD_FILE
        self._settings = json.loads(json.dumps(settings))  # as it is read again
        self._record: dict[str, Any] = read_json(self._file) if self._file.exists() else {}
        if self._record:
            try:
                self._record["settings"] = completed(name, self._record["settings"])
            except (KeyError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"{self._file}: what the stage was started with cannot be read ({type(error).__name__}: {error}); "
                    f"choose another `name`, or remove {self.folder} and the folders of the stages after it"
                ) from error
        self._since = time.monotonic()

    @property
    def id(self) -> str | None:
        """Tells this run of the stage from others."""
        return self._record.get("id")

    @property
    def is_finished(self) -> bool:
        """Whether it never has to be done again."""
        return self._record.get("finished") is not None

    def check(self, before: "Stage | None") -> None:
        """Makes sure that what is finished is what is asked for.

        Args:
            before: The stage before this one.

        Raises:
            ValueError: If a setting has changed since, or the stage before it is another one by now.
        """
        if not self.is_finished:
            return
        for key, then, now in differences(self._record["settings"], self._settings):
            raise ValueError(
                f"{key} was {then!r} and is now {now!r}, but the stage {self.name} is finished: choose another `name`, "
                f"or remove {self.folder} and the folders of the stages after it to do them again"
            )
        if before and (not before.is_finished or self._record["after"] != before.id):
            raise ValueError(
                f"{self.folder} was made after a stage {before.name} that is gone: remove it too, to do it again"
            )

    def begin(self, before: "Stage | None") -> None:
        """Starts the stage, or goes on with it; what was begun with other settings is removed.

        A folder of training is left to training, which looks after itself.
        """
        now = {"settings": self._settings, "after": before and before.id}
        deployed = self.has_deployed
        same = all(self._record.get(key) == value for key, value in now.items())
        if not same and self.name != "train":
            shutil.rmtree(self.folder, ignore_errors=True)
            self._record = {}
        for aside in self.folder.glob(".*.tmp-*"):  # of a process that was killed
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        self._record = {
            "id": self.id or uuid.uuid4().hex[:12],
            **now,
            "begun": self._record.get("begun") or _now(),
            "starts": self._record.get("starts", 0) + 1,
            "seconds": self._record.get("seconds", 0.0),
            "finished": None,
            "deployed": deployed,
        }
        self._since = time.monotonic()
        self._save()

    def pause(self) -> None:
        """Takes down the time it has taken so far."""
        self._record["seconds"] += time.monotonic() - self._since
        self._since = time.monotonic()
        self._save()

    @property
    def has_deployed(self) -> bool:
        """Whether it has put something on the cluster, which may be there still."""
        return self._record.get("deployed", False)

    def note(self, **facts: Any) -> None:
        """Takes something down, though the stage is not finished by it."""
        self._record |= facts
        self._save()

    def finish(self, gave: dict[str, Any], *, flops: float | None) -> None:
        """Takes down that it is finished.

        Args:
            gave: What came out, for the report.
            flops: What it has computed; None where that is not known.
        """
        self._record |= {"finished": _now(), "flops": flops, "gave": gave}
        self.pause()

    @property
    def seconds(self) -> float:
        """Time it has taken, over all its starts that did not end in a kill."""
        return self._record["seconds"]

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, json.dumps(self._record, indent=2) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
