"""Runs as a user starts them: the `raygrow` command in a process of its own, on the Ray of the tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from raygrow.config import RunConfig, to_tree

RAYGROW = Path(sys.executable).parent / "raygrow"
POLL_SECONDS = 0.02


def settings(run: RunConfig) -> list[str]:
    """The words after `raygrow train` that give this run."""

    def text(value: Any) -> str:
        if value is None:
            return "null"
        if isinstance(value, list | tuple):
            return f"[{','.join(map(str, value))}]"
        return f"'{value}'" if "=" in str(value) else str(value)

    def words(tree: dict[str, Any], path: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from words(value, f"{path}{key}.")
            else:
                yield f"{path}{key}={text(value)}"

    return [f"data={run.data.kind}", *words(to_tree(run))]


class Driver:
    """A `raygrow` command at work."""

    def __init__(self, folder: Path, words: list[str], environment: dict[str, str]) -> None:
        self.output = folder / f"driver-{time.monotonic_ns()}.txt"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [RAYGROW, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=os.environ | environment,
                start_new_session=True,
            )

    def wait(self) -> int:
        """The exit status, and no traceback on the way."""
        status = self.process.wait(timeout=400)
        assert "Traceback" not in self.said(), self.said()
        return status

    def said(self) -> str:
        return self.output.read_text()

    def until(self, condition: Callable[[], Any]) -> Any:
        """Waits for something to come true while the command runs; gives what it came to."""
        while not (value := condition()):
            assert self.process.poll() is None, f"the run ended first:\n{self.said()}"
            time.sleep(POLL_SECONDS)
        return value


@contextmanager
def driver(folder: Path, *words: str, **environment: str) -> Iterator[Driver]:
    """Runs a `raygrow` command on the Ray of the tests; it does not outlive the body."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Driver(folder, list(words), {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} | environment)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()
            while train_workers():  # Ray ends what belonged to the driver
                time.sleep(POLL_SECONDS)


def train_workers() -> list[psutil.Process]:
    """The processes that train, on the Ray that this test session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and "RayTrainWorker" in process.cmdline()[0]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history; the last one may be on its way."""
    file = run / "history.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[str, int, float, float | None]]:
    """What must come out the same whatever happens on the way."""
    return [(line["phase"], line["step"], line["loss"], line.get("val_loss")) for line in history(run)]
