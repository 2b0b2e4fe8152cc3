"""What the driver does while a phase trains: it shows a live line (in a log, one every few seconds) and listens."""

import time
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from rich.console import Console

from raygrow.runtime.stop import StopWish
from raygrow.train.plan import Phase

POLL_SECONDS = 1.0
LOG_SECONDS = 10.0
"""Time between two lines where the output is not a terminal."""


def follow(phase: Phase, run: Future, history: ActorHandle, wish: StopWish, console: Console) -> None:
    """Shows a phase's progress until it ends, and passes on the wish to stop.

    Args:
        phase: The phase in training.
        run: Done when the phase has ended, one way or another.
        history: The run's history actor.
        wish: Made when the run is to stop.
        console: Where to show it.
    """
    shown_step, scored, last_print, told = -1, {}, 0.0, False
    with console.status(f"{phase.name}: starting workers") as status:
        finished = False
        while not finished:
            finished = bool(wait([run], POLL_SECONDS).done)  # one more look after the end, for the last line
            if wish.made and not told:
                console.print("Saving a checkpoint, then stopping. Once more stops at once.", highlight=False)
                history.request_stop.remote()
                told = True
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
