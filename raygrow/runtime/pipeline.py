"""The end-to-end pipeline in one job: text, a growth plan, evaluation, a sparse model, a server that is asked.

Each stage calls what the command of its name calls. Started again under its name, a pipeline goes on with the first
stage that is not finished.
"""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import serve
from rich.console import Console

from raygrow.config import as_yaml
from raygrow.evaluate.record import commit, versions
from raygrow.report.html import write_report
from raygrow.report.pipeline import PIPELINE_FILE, STAGES
from raygrow.report.text import print_summary
from raygrow.runtime.cluster import connect, has_gpu
from raygrow.runtime.data import prepare_data
from raygrow.runtime.elsewhere import elsewhere
from raygrow.runtime.pipeline_config import PipelineConfig, as_tree, check_prepared, completed
from raygrow.runtime.progress import progress_bars
from raygrow.runtime.serve import API_KEY, APP, serve_models
from raygrow.runtime.stage_work import continue_text, make_sparse, score
from raygrow.runtime.stages import Stage
from raygrow.runtime.train import EXIT_CODES, train
from raygrow.sparsity.plan import PLAN_FILE
from raygrow.weights.atomic import replace_file
from raygrow.weights.json_file import read_json

SECONDS_TO_ANSWER = 600
"""Longest wait for the server's answer: an engine may have to start first."""


class Ended(Exception):
    """A stage that has ended without being finished; its argument is the exit code."""


def run_pipeline(config: PipelineConfig) -> int:
    """Runs the stages that are not finished, and writes the report.

    Args:
        config: What to do.

    Returns:
        An exit code of `EXIT_CODES`.

    Raises:
        ValueError: If something about the settings or the data stands against it, or a stage cannot go on; what is
            finished stays.
    """
    console = Console()
    work = _Work(config, console)
    _check_claim(config.root)
    for before, stage in zip([None, *work.stages], work.stages, strict=False):
        stage.check(before)
    check_prepared(config)
    config.root.mkdir(parents=True, exist_ok=True)
    made_with = {"commit": commit(), **versions()}
    replace_file(config.root / PIPELINE_FILE, as_yaml(as_tree(config)) + as_yaml({"made_with": made_with}))
    code = work.run()
    if code == EXIT_CODES["stopped"]:
        told = f"{config.run.name} was stopped. The same command goes on from what is there: {config.root}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if not work.reported:
        work.report()
    return code


def _check_claim(root: Path) -> None:
    """Makes sure that the folder is a pipeline's, or nobody's."""
    if root.exists() and any(root.iterdir()) and not (root / PIPELINE_FILE).exists():
        raise ValueError(f"{root} holds something other than a pipeline: choose another `name`")


class _Work:
    """The stages of one pipeline, at work.

    Args:
        config: What to do.
        console: Told how it goes.
    """

    def __init__(self, config: PipelineConfig, console: Console) -> None:
        self._config, self._console = config, console
        self._root = config.root
        self._data = Path(config.run.data.path).resolve()
        self._model = self._root / "train/model"
        self._sparse = self._root / "sparsify/model"
        self.stages = [Stage(name, self._root, config.deciding(name), completed) for name in STAGES]
        self.reported = False

    def run(self) -> int:
        """Does what is left; how it ended, as an exit code."""
        before, stage = None, None
        try:
            with _signals_stop():
                for number, stage in enumerate(self.stages, start=1):
                    where = f"stage {number} of {len(self.stages)}, {stage.name}"
                    if stage.is_finished and not (stage.name == "serve" and self._config.serve.keep):
                        self._say(f"{where}: finished before")
                    else:
                        self._do(stage, before, where)
                    before = stage
        except Ended as ended:
            return ended.args[0]
        except KeyboardInterrupt:
            return EXIT_CODES["stopped"]
        return EXIT_CODES["finished"]

    def report(self) -> None:
        """Writes the report, and prints what it says."""
        self.reported = True
        page = write_report([self._root], self._root)
        print_summary([self._root], self._console)
        self._say(f"report: {page}")

    def _do(self, stage: Stage, before: Stage | None, where: str) -> None:
        self._say(where, style="bold")
        anew = not stage.is_finished
        if anew:
            stage.begin(before)
        work: dict[str, Callable[[Stage], None]] = {
            "prepare": self._prepare,
            "train": self._train,
            "evaluate": self._evaluate,
            "sparsify": self._sparsify,
            "serve": self._serve,
        }
        try:
            work[stage.name](stage)
        finally:
            if not stage.is_finished:
                stage.pause()
        if anew:
            self._say(f"{where}: finished in {stage.seconds:.0f} s")

    def _prepare(self, stage: Stage) -> None:
        with progress_bars() as progress:
            manifest = prepare_data(self._config.run.data, progress=progress)
        self._config.check_data()
        splits = {
            name: {"documents": split.documents, "tokens": split.tokens, "bytes": split.bytes}
            for name, split in manifest.splits.items()
        }
        stage.finish({"path": str(self._data), "vocab_size": manifest.vocab_size, "splits": splits}, flops=0.0)

    def _train(self, stage: Stage) -> None:
        if code := train(self._config.training):
            raise Ended(code)
        summaries = [read_json(file) for file in sorted(self._root.glob("train*/summary.json"))]
        stage.finish({}, flops=sum(summary["flops"] for summary in summaries))

    def _evaluate(self, stage: Stage) -> None:
        stage.finish({}, flops=self._score(self._model, stage.folder, [None]))

    def _sparsify(self, stage: Stage) -> None:
        config = self._config
        self._elsewhere(make_sparse, model=self._model, target=self._sparse, data=self._data, config=config.calibration)
        flops = self._score(self._sparse, stage.folder, self._levels)
        cost = stage.folder / "cost.json"  # not there if it was killed in between
        stage.finish({}, flops=read_json(cost)["flops"] + flops if cost.exists() else None)

    @property
    def _levels(self) -> list[float]:
        """What the sparse model was made for, the least first."""
        return sorted(map(float, read_json(self._sparse / PLAN_FILE)["levels"]))

    def _score(self, model: Path, out: Path, levels: Sequence[float | None]) -> float:
        evaluate = self._config.evaluate
        return self._elsewhere(
            score,
            model=model,
            data=self._data,
            out=out,
            levels=levels,
            sequences=evaluate.sequences,
            seq_len=self._config.seq_len,
            batch_size=evaluate.batch_size,
        )

    def _serve(self, stage: Stage) -> None:
        config, asked = self._config, self._config.serve
        anew, failure = not stage.is_finished, None
        connect()
        served = config.served(self._sparse, self._levels)
        (llm,) = served.llm_configs
        self._check_cluster(stage, llm.deployment_name)
        expected = {}
        if anew:
            question = {"engine": llm.engine_kwargs, "prompt": asked.prompt, "tokens": asked.tokens}
            options = asked.deployment_config.ray_actor_options
            use_gpu = has_gpu() if options is None else options.get("num_gpus", 0) > 0  # as a replica
            expected = self._elsewhere(continue_text, use_gpu=use_gpu, model=self._sparse, **question)

        def ready(address: str) -> bool:
            nonlocal failure
            try:
                if anew:
                    self._check_answer(stage, address, expected, llm.engine_kwargs.sparsity)
                    self._say("the server answers with the tokens of the offline engine")
                self.report()
            except (ValueError, OSError) as error:
                failure = error
            return asked.keep and failure is None

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        stage.note(deployed=True)
        try:
            serve_models(
                served,
                host=asked.host,
                port=asked.port,
                api_key=os.environ.get(API_KEY),
                ready=ready,
            )
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        stage.note(deployed=False)
        if failure:
            raise failure

    def _check_cluster(self, stage: Stage, deployment: str) -> None:
        """Makes sure that the app would not take the place of another; one that a kill left behind is its own."""
        app = serve.status().applications.get(APP)
        if app and not (stage.has_deployed and deployment in app.deployments):
            raise ValueError(
                f"this cluster serves an app {APP!r} already, in whose place this one would go: end it with "
                "`serve shutdown`, then start the pipeline again"
            )

    def _check_answer(self, stage: Stage, address: str, expected: dict[str, Any], sparsity: float | None) -> None:
        """Asks the server, and takes down what it said; ValueError if it is not what the engine says by itself."""
        asked = self._config.serve
        started = time.perf_counter()
        answer = _ask(
            address,
            {"model": self._config.run.name, "prompt": asked.prompt, "max_tokens": asked.tokens},
            self._config.serve.api.api_key or os.environ.get(API_KEY),
        )
        seconds = time.perf_counter() - started
        (choice,) = answer["choices"]
        tokens, expected_tokens = (found["logprobs"]["tokens"] for found in (choice, expected))
        same = (choice["text"], tokens) == (expected["text"], expected_tokens)
        gave = {
            "model": str(self._sparse),
            "model_id": self._config.run.name,
            "sparsity": sparsity,
            "prompt": asked.prompt,
            "answer": choice["text"],
            "offline": expected["text"],
            "tokens": len(tokens),
            "finish_reason": choice["finish_reason"],
            "same": same,
            "seconds": seconds,
        }
        if not same:
            stage.note(gave=gave)
            raise ValueError(
                f"the server continued {asked.prompt!r} with {choice['text']!r}, and the engine by itself with "
                f"{expected['text']!r}: they should be the same"
            )
        stage.finish(gave, flops=None)

    def _elsewhere(self, function: Callable[..., Any], *, use_gpu: bool | None = None, **arguments: Any) -> Any:
        """Calls a function in a process like one that trains, with a GPU or without where that is said."""
        connect()
        workers = self._config.run.workers
        if use_gpu is None:
            use_gpu = has_gpu() if workers.use_gpu == "auto" else workers.use_gpu
        with elsewhere(cpus=workers.cpus, use_gpu=use_gpu) as process, progress_bars() as progress:
            return process.call(function, progress=progress, **arguments)

    def _say(self, text: str, *, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _signals_stop() -> Iterator[None]:
    """Has SIGTERM do what Ctrl-C does, but while a stage listens to them itself."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(address: str, question: dict[str, Any], api_key: str | None) -> dict[str, Any]:
    """A completion, greedy and with its tokens, through the API."""
    body = json.dumps({**question, "temperature": 0, "logprobs": 0}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(f"{address}/v1/completions", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} answered {error.code}: {error.read().decode(errors='replace')}") from None
    except urllib.error.URLError as error:
        raise OSError(f"nothing answers at {address} ({error.reason})") from None
