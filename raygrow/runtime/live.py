"""What the driver shows while a phase trains: a live line on a terminal, one line every few seconds in a log."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from rich.console import Console

from raygrow.train.plan import Phase

POLL_SECONDS = 1.0
LOG_SECONDS = 10.0
"""Time between two lines where the output is not a terminal."""


@contextmanager
def live_progress(phase: Phase, history: ActorHandle, console: Console) -> Iterator[None]:
    """Shows a phase's progress while the body runs."""
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(phase, history, console, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress_line(phase: Phase, record: dict[str, Any], best: dict[str, Any]) -> str:
    """Step, share, loss, speed, MFU and time left, in one line.

    Args:
        phase: The phase in training.
        record: Its newest line of history.
        best: The newest line with a validation loss; may be empty.
    """
    left = (phase.steps - record["step"]) * phase.step_tokens / record["tokens_per_second"]
    parts = [
        f"{phase.name}: step {record['step']:,}/{phase.steps:,} ({record['step'] / phase.steps:.0%})",
        f"{record['tokens']:,} tokens",
        f"loss {record['loss']:.4f}",
        f"val {best['val_loss']:.4f}" if best else "",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"MFU {record['mfu']:.1%}" if record["mfu"] else "",
        f"{left // 60:.0f}:{left % 60:02.0f} left",
    ]
    return "  ".join(part for part in parts if part)


def _watch(phase: Phase, history: ActorHandle, console: Console, done: threading.Event) -> None:
    shown_step, scored, last_print = -1, {}, 0.0
    with console.status(f"{phase.name}: starting workers") as status:
        finished = False
        while not finished:
            finished = done.wait(POLL_SECONDS)  # one more look after the end, for the last line
            try:
                record, events = ray.get(history.news.remote())
            except RayError:  # the cluster is going down; the run itself reports why
                return
            for event in events:
                console.print(event, highlight=False)
            if not record or record["phase"] != phase.name or record["step"] == shown_step:
                continue
            scored = record if "val_loss" in record else scored
            line, shown_step = progress_line(phase, record, scored), record["step"]
            status.update(line)
            if finished or (not console.is_terminal and time.monotonic() - last_print > LOG_SECONDS):
                console.print(line, highlight=False, soft_wrap=True)
                last_print = time.monotonic()
