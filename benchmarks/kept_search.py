"""Searches as they are kept among the results: all that their figures and curves need, without checkpoints.

So the stages of a long benchmark may run on several machines, one after the other, and each is run once.
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ORIGIN = "origin.json"
FILES = "search.yaml", "results.json", "cost.json"
TRIAL_FILES = "run.yaml", "summary.json"
HISTORY = "history.jsonl"


def keep(search: Path, file: Path, origin: dict[str, Any]) -> None:
    """Writes a search that has ended to a zip file.

    Args:
        search: Its folder.
        file: The file.
        origin: Where and how it was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder)
        (aside / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
        for name in FILES:
            shutil.copyfile(search / name, aside / name)
        for history in sorted(search.glob(f"trials/*/{HISTORY}")):
            target = aside / "trials" / history.parent.name
            target.mkdir(parents=True)
            (target / HISTORY).write_text(_thinned(history.read_text()))
            for name in TRIAL_FILES:
                if (history.parent / name).exists():
                    shutil.copyfile(history.parent / name, target / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.make_archive(str(file.with_suffix("")), "zip", aside)


def restore(file: Path, search: Path) -> dict[str, Any]:
    """Makes the folder of a kept search where there is none. Returns where and how it was run."""
    if not search.exists():
        shutil.unpack_archive(file, search)
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read(ORIGIN))


def _thinned(history: str) -> str:
    """The lines of evaluations and of the ends of phases."""
    lines = [(json.loads(line), line) for line in history.splitlines()]
    followers = [row["phase"] for row, _ in lines[1:]] + [None]
    kept = [
        line
        for (row, line), follower in zip(lines, followers, strict=True)
        if row.get("val_loss") or row["phase"] != follower
    ]
    return "\n".join([*kept, ""])
