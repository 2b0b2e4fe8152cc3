"""One replica by itself: how it ends when its engine does, what its load asks for, and what becomes of its answers."""

import asyncio
import re
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raygrow.data.corpus import FilesCorpus
from raygrow.infer.request import Delta, Request, merged
from raygrow.infer.sampling import Sampling
from raygrow.runtime.openai.model import Overloaded
from raygrow.runtime.serve import Served
from raygrow.runtime.serve_config import LLMConfig, ModelLoadingConfig
from raygrow.runtime.serve_replica import engine_load
from tests.processes import run_script
from tests.runtime.serving import random_model


def test_merged_pieces_are_the_whole() -> None:
    pieces = [
        Delta("a", (1,), "x", prompt_logprobs=(None,), cached_tokens=3),
        Delta("a", (2, 3), "yz"),
        Delta("a", (4,), "!", finish_reason="stop"),
    ]
    whole = Delta("a", (1, 2, 3, 4), "xyz!", prompt_logprobs=(None,), finish_reason="stop", cached_tokens=3)
    assert merged(pieces) == whole
    assert merged(pieces[:1]) == pieces[0]


class Failing:
    """A handle whose requests come to an error."""

    def __init__(self, error: Exception) -> None:
        self.error, self.generate = error, self

    def options(self, **options: Any) -> "Failing":
        return self

    async def remote(self, request: Request) -> AsyncIterator[Delta]:
        raise self.error
        yield


def test_a_full_queue_passes_and_a_deployment_that_failed_does_not(corpus: FilesCorpus, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")
    llm = LLMConfig(model_loading_config=ModelLoadingConfig(model_id="small", model_source=str(folder)))

    async def ask(error: Exception) -> list[Delta]:
        handle: Any = Failing(error)
        return [
            delta async for delta in Served(llm, handle).generate(Request(id="a", prompt=(1,), sampling=Sampling()))
        ]

    with pytest.raises(Overloaded):
        asyncio.run(ask(BackPressureError(num_queued_requests=1, max_queued_requests=1)))
    (told,) = asyncio.run(ask(DeploymentUnavailableError(DeploymentID("engine-small", "raygrow"))))
    assert told.finish_reason == "error"
    assert told.error == "small: no replica of it runs, and none could be started"


@pytest.mark.parametrize(
    ("requests", "running", "waiting", "wanted"),
    [
        (8, {"r": 8}, {"r": 0}, 1),
        (24, {"r": 24}, {"r": 0}, 3),  # by the target, 8
        (8, {"r": 2}, {"r": 6}, 4),  # memory holds two at a time
        (8, {"r": 0}, {"r": 8}, 1),  # nothing runs yet: not a matter of memory
        (0, {}, {}, 0),
    ],
)
def test_load_asks_for_replicas(requests: int, running: Any, waiting: Any, wanted: float) -> None:
    empty: Any = None
    context = AutoscalingContext(
        deployment_id=empty,
        deployment_name="engine-small",
        app_name="raygrow",
        current_num_replicas=1,
        target_num_replicas=1,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0,
        aggregated_metrics={"running": running, "waiting": waiting},
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(min_replicas=0, max_replicas=8, target_ongoing_requests=8),
    )
    assert engine_load(context)[0] == wanted


BROKEN = """
    import os, time
    from raygrow.infer import load, process

    def load_engine(folder, config):
        process.STUCK_SECONDS = 0.5
        loaded = load.load_engine(folder, config)
        loaded.step = lambda: {fault}
        return loaded
"""
STUCK = """
    import asyncio, os, sys
    sys.path.append(os.getcwd())
    import broken
    from raygrow.infer.config import EngineConfig
    from raygrow.infer.request import Request
    from raygrow.infer.sampling import Sampling
    from raygrow.runtime import serve_replica

    async def main():
        serve_replica.load_engine = broken.load_engine
        replica = serve_replica.Replica(sys.argv[1], EngineConfig(max_num_seqs=2))
        await replica.check_health()
        answer = replica.generate(Request(id="a", prompt=(1,), sampling=Sampling()))
        reading = asyncio.create_task(anext(answer))
        await asyncio.sleep(1.5)
        try:
            await replica.check_health()
        except RuntimeError as error:
            print(error, reading.result().error if reading.done() else "still waiting", flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("time.sleep(600)", r"the engine is stuck: one step has taken \d seconds still waiting"),
        ("1 / 0", "the engine has failed: division by zero the engine has failed: division by zero"),
        ("os._exit(3)", r"(the engine has failed: its process has ended \(exit status 3\) ?){2}"),
    ],
)
def test_a_replica_ends_with_its_engine(fault: str, told: str, corpus: FilesCorpus, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STUCK))
    (tmp_path / "broken.py").write_text(textwrap.dedent(BROKEN).replace("{fault}", fault))
    done = run_script(script, [str(folder)], cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(told, done.stdout.strip()), done.stdout + done.stderr
