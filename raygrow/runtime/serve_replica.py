"""One replica of a model on Ray Serve: an engine, its health and its figures; and how many replicas there should be."""

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import Any

from ray.serve import metrics
from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from raygrow.infer.config import EngineConfig
from raygrow.infer.load import load_engine
from raygrow.infer.loop import EngineEnded
from raygrow.infer.process import HANGING_SECONDS, EngineProcess
from raygrow.infer.request import Delta, Request

logger = logging.getLogger("ray.serve")

PIECES_PER_SECOND = 1000
"""Pieces that a replica sends, of all its answers together. Each costs Ray a fraction of a millisecond, so that tokens
come one by one while there are few answers, and several at once when there are many."""
REPORT_SECONDS = 2.0
SECONDS_TO_TELL = 1.0
"""Between a failed health check and the end of the process."""
GAUGES = {
    "running": "Sequences that run",
    "waiting": "Sequences that wait for a slot or for memory",
    "kv_used_bytes": "Keys and values in use",
    "kv_mapped_bytes": "Memory mapped for keys and values",
    "kv_reclaimable_bytes": "Of that, what can be taken back at once",
    "kv_budget_bytes": "Most that keys and values may take",
    "preemptions": "Sequences that gave up their memory and began again, since the start",
    "prefix_hit_tokens": "Tokens of prompts that were found in the cache, since the start",
    "steps": "Steps of the engine, since the start",
    "tokens": "Tokens made, since the start",
}
"""Figures of an engine that Ray's metrics show for every replica, as raygrow_engine_<name>."""


class Replica:
    """An engine that requests are sent to. Serve makes one in a process of its own.

    Args:
        folder: Of the model.
        config: Of the engine.
    """

    def __init__(self, folder: str, config: EngineConfig) -> None:
        self._engine = EngineProcess(partial(load_engine, Path(folder), config))
        self._answers = 0
        self._gauges = {name: metrics.Gauge(f"raygrow_engine_{name}", text) for name, text in GAUGES.items()}
        self._reports: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Delta]:
        """An answer in pieces. Closing the iterator, as Serve does when the client has gone, frees its slot."""
        begun = 0
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if not begun:  # those that wait for a slot send nothing
                        begun = 1
                        self._answers += 1
                    yield delta
                    if delta.finish_reason is None:
                        await asyncio.sleep(self._answers / PIECES_PER_SECOND)
        except EngineEnded as error:  # as the answers that it has taken along: clients may ask again
            yield Delta(request.id, finish_reason="error", error=str(error))
        finally:
            self._answers -= begun

    async def check_health(self) -> None:
        """Fails when the engine has died or is stuck. Then the process ends, and what waits for it is told.

        Serve by itself would let a stuck replica keep its GPU until its last answer, which never comes.
        """
        if self._reports is None:
            self._reports = asyncio.create_task(self._report())
        try:
            await self._engine.stats()
        except Exception:
            logger.exception("the engine does not work any more; this replica ends")
            asyncio.get_running_loop().call_later(SECONDS_TO_TELL, os._exit, 1)
            raise

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `engine_load` goes by."""
        stats = await self._engine.stats()
        return {"running": stats.running, "waiting": stats.waiting}

    async def _report(self) -> None:
        while True:
            faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True)  # by a thread that needs no Python
            with contextlib.suppress(RuntimeError):  # which the next health check finds
                stats = await self._engine.stats()
                for name, gauge in self._gauges.items():
                    gauge.set(getattr(stats, name))
            await asyncio.sleep(REPORT_SECONDS)


def engine_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many replicas there should be: requests, by what a replica can run.

    That is the target, or what it runs now while others wait for memory. Serve applies bounds and delays.
    """
    wanted, state = replica_queue_length_autoscaling_policy(context)
    figures = context.aggregated_metrics or {}
    running, waiting = (figures.get(name, {}) for name in ("running", "waiting"))
    short = [running[replica] for replica, count in waiting.items() if count >= 1 and running.get(replica, 0) >= 1]
    if short and context.total_num_requests:
        wanted = max(wanted, math.ceil(context.total_num_requests / (sum(short) / len(short))))
    return wanted, state
