"""Runs a plan on Ray Train: one TorchTrainer run per phase, each resumable under its own name.

A run started again under its name goes on where it stopped: finished phases are skipped, the phase in work resumes
from its newest checkpoint, and a finished run says so.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from rich.console import Console
from rich.markup import escape

from raygrow.config import RunConfig
from raygrow.data.shards import check_tokenizer, open_tokens
from raygrow.report.html import write_report
from raygrow.report.text import print_summary
from raygrow.runtime.cluster import connect, has_gpu
from raygrow.runtime.data import prepare_data
from raygrow.runtime.history import open_history
from raygrow.runtime.live import follow
from raygrow.runtime.progress import progress_bars
from raygrow.runtime.run_folder import RunFolder
from raygrow.runtime.saves import Saves
from raygrow.runtime.session import RaySession
from raygrow.runtime.stop import StopWish, stop_wish
from raygrow.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from raygrow.train.config import TrainConfig
from raygrow.train.loop import Outcome, train_phase
from raygrow.train.plan import Phase, resolve, scratch_plan

EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 143}
"""Of the process, by how the run ended; 143 is what a shell gives for SIGTERM, the usual way to stop a run."""


def train(run: RunConfig) -> int:
    """Trains a run, and its control from scratch where asked for; writes the report.

    Args:
        run: The whole configuration.

    Returns:
        An exit code from `EXIT_CODES`.

    Raises:
        ValueError: If the plan or the data cannot be used; nothing has been trained then.
    """
    console = Console()
    phases = resolve(run.plan, run.model, run.train)
    check_data(run, phases)
    connect()
    folders = [RunFolder.of(run.storage_path, run.name)]
    with stop_wish() as wish:
        status = _train_plan(run, phases, folders[0], wish, console)
        if run.control and status == "finished":
            control = replace(run, name=f"{run.name}-scratch", plan=scratch_plan(phases), control=False)
            folders.append(RunFolder.of(control.storage_path, control.name))
            control_phases = resolve(control.plan, control.model, control.train)
            status = _train_plan(control, control_phases, folders[1], wish, console)
    _report(folders, console)
    # a wish to stop that came while the model was written: what would come next is not wanted
    return EXIT_CODES["stopped" if wish.made and status == "finished" else status]


def check_data(run: RunConfig, phases: tuple[Phase, ...]) -> None:
    """Prepares the data where that has not been done, reads every shard once, and holds the tokenizer to the models."""
    with progress_bars() as progress:
        manifest = prepare_data(run.data, progress=progress)
    for split in ("train", "validation"):
        open_tokens(run.data.path, split, verify=True)
    if manifest.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the vocabulary of the tokenizer that "
            f"{run.data.path} was prepared with, {manifest.vocab_size}: raise it, or prepare the data again"
        )
    for phase in phases:
        if phase.init and (Path(phase.init) / TOKENIZER_FILE).exists():
            check_tokenizer(manifest, load_tokenizer(phase.init), name=f"the tokenizer of {phase.init}")


def _train_plan(run: RunConfig, phases: tuple[Phase, ...], folder: RunFolder, wish: StopWish, console: Console) -> str:
    """Trains what is left of a run's phases; returns how it ended."""
    folder.claim(run)
    if folder.is_finished():
        told = f"{run.name} is finished: {folder.uri}/report.html shows it. Another name starts another run."
        console.print(told, highlight=False, soft_wrap=True)
        return "finished"
    folder.claim_data(run.data.path)
    folder.remove("summary.json")  # of an earlier start, which ended otherwise
    history, saves = open_history(folder), Saves(run, folder, console)
    outcome, checkpoint = Outcome("finished"), None
    for phase in phases:
        checkpoint_before, checkpoint = checkpoint, folder.finished_phase(phase.name)
        if checkpoint is None and wish.made:
            outcome = Outcome("stopped", f"{phase.name}: not begun")
            break
        saves.start(phase, checkpoint_before)
        if checkpoint is None:
            folder.mend_phase(phase.name)
            trainer = _trainer(run, phase, checkpoint_before, folder, history)
            fit = _in_thread(trainer.fit)
            follow(phase, fit, history, wish, console)
            outcome, checkpoint = _ending(phase, fit)
        if outcome.status != "finished" or checkpoint is None:
            break
        folder.finish_phase(phase.name, checkpoint)
        saves.end(phase, checkpoint)
    if unwritten := ray.get(history.close.remote()):
        folder.write_history(unwritten)
    saves.history()
    if outcome.status == "finished" and checkpoint:
        saves.write(phases[-1], checkpoint, "model")
    else:
        ending = f"[bold]{run.name} {outcome.status}[/]: {escape(outcome.reason)}"
        console.print(ending, highlight=False, soft_wrap=True)
    folder.write_summary(phases, outcome)
    return outcome.status


@dataclass(frozen=True, kw_only=True)
class _WorkerArguments:
    """What a worker is sent."""

    phase: Phase
    config: TrainConfig
    data: Path
    seed: int
    source: Checkpoint | None
    history: ActorHandle
    threads: int


def _train_worker(arguments: dict[str, _WorkerArguments]) -> dict[str, str]:
    """Runs on every worker of a phase."""
    a = arguments["arguments"]
    failure: Any = ray.get(a.history.failure.remote())
    if failure:
        return asdict(Outcome("failed", failure))
    torch.set_num_threads(a.threads)
    try:
        with ExitStack() as downloads:
            outcome = train_phase(
                a.phase,
                a.config,
                data=a.data,
                seed=a.seed,
                source=Path(downloads.enter_context(a.source.as_directory())) if a.source else None,
                session=RaySession(a.phase.name, a.history, downloads),
                device=str(get_device()),
            )
    except ValueError as error:
        # Raised, since the others may be waiting for this worker. Ray starts the group again, which then finds this.
        ray.get(a.history.fail.remote(f"{a.phase.name}: {error}"))
        raise
    return asdict(outcome)


def _trainer(
    run: RunConfig, phase: Phase, source: Checkpoint | None, folder: RunFolder, history: ActorHandle
) -> TorchTrainer:
    """The Ray Train run of one phase."""
    workers = run.workers
    use_gpu = has_gpu() if workers.use_gpu == "auto" else workers.use_gpu
    arguments = _WorkerArguments(
        # workers run in a directory of their own, where relative paths would lead elsewhere
        phase=replace(phase, init=str(Path(phase.init).resolve())) if phase.init else phase,
        config=run.train,
        data=Path(run.data.path).resolve(),
        seed=run.seed,
        source=source,
        history=history,
        threads=max(1, int(workers.cpus)),
    )
    # read by cuBLAS when CUDA starts, so it has to be there before
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if run.train.deterministic else {}
    return TorchTrainer(
        _train_worker,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=phase.workers or workers.num,
            use_gpu=use_gpu,
            resources_per_worker=_resources(workers.cpus, use_gpu),
        ),
        run_config=ray.train.RunConfig(
            name=phase.name,
            storage_path=folder.phases_uri,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.train.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _in_thread(function: Callable[[], Any]) -> Future:
    """Calls a function in a thread of its own: in the main one, Ray would keep Ctrl-C to itself."""
    future = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _ending(phase: Phase, fit: Future) -> tuple[Outcome, Checkpoint | None]:
    """How a phase ended, and its last checkpoint."""
    try:
        result = fit.result()
    except ray.train.TrainingFailedError as error:
        return Outcome("failed", _cause(phase, error)), None
    assert isinstance(result.return_value, dict), "what _train_worker returned on rank 0"
    return Outcome(**result.return_value), result.checkpoint


def _resources(cpus: float, use_gpu: bool) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": 1} if use_gpu else {})


def _cause(phase: Phase, error: Exception) -> str:
    """The first line of what brought a phase down, without the tracebacks around it."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {0: error}
    # a worker that dies takes the others along: what they say of their lost connection comes last
    rank, failure = min(failures.items(), key=lambda item: "by peer" in str(item[1]))
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return (
        f"{phase.name}: worker {rank} failed for good: {lines[-1] if lines else repr(failure)} "
        "The newest checkpoint is kept; starting the run again goes on from it."
    )


def _report(folders: list[RunFolder], console: Console) -> None:
    """The terminal's summary, and report.html in the first run's folder."""
    with ExitStack() as stack:
        records = [stack.enter_context(folder.records()) for folder in folders]
        print_summary(records, console)
        page = write_report(records, records[0])
        if not folders[0].local:
            for file in (page, page.with_name("loss.png")):
                if file.exists():
                    folders[0].upload(file, file.name)
    console.print(f"report: {folders[0].uri}/{page.name}", highlight=False, soft_wrap=True)
