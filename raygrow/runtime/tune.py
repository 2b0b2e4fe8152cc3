"""The driver of a search: Ray Tune runs its trials, which train in the processes that Tune gives them."""

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.result_grid import ResultGrid
from rich.console import Console

from raygrow.config import RunConfig, as_yaml, build, to_tree
from raygrow.report.html import write_report
from raygrow.report.runs import read_yaml
from raygrow.report.search import COST_FILE, RESULTS_FILE
from raygrow.report.text import print_summary
from raygrow.runtime.choosing import chooser, stopper
from raygrow.runtime.cluster import connect, has_gpu
from raygrow.runtime.run_folder import RunFolder, differences
from raygrow.runtime.stop import StopWish, stop_wish
from raygrow.runtime.train import EXIT_CODES, check_data
from raygrow.runtime.trial import SearchFolder, train_trial
from raygrow.runtime.trunks import open_trunks
from raygrow.runtime.tune_progress import Told
from raygrow.space import SpaceConfig
from raygrow.train.loop import Outcome
from raygrow.train.shared import remove_unkept, segments
from raygrow.trials import Search, cost
from raygrow.weights.atomic import replace_file

TUNE_FOLDER = "tune"
SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
}
"""Read by Tune: no table of its own, trials stay in the driver's folder, no curves beside ours, Ctrl-C is ours, and its
state is saved often."""
POLL_SECONDS = 0.2
CAN_CHANGE = ("run.workers", "run.dry_run", "run.storage_path", "space.trial.cpus", "space.trial.gpus")
"""Keys that a search started again may give another value. The others of a trial Tune keeps as it began with them."""


def run_search(search: Search) -> int:
    """Runs a search to its end, or on from where it was stopped; writes its results and the report.

    Args:
        search: What to try.

    Returns:
        An exit code from `EXIT_CODES`.

    Raises:
        ValueError: If a trial could not be trained, or there is no room for one; none has begun then.
    """
    console = Console()
    folder = SearchFolder(Path(RunFolder.of(search.run.storage_path, search.run.name).uri))
    _check_claim(search, folder)
    check_data(search.run, tuple(phase for trial in search.corners for phase in trial.phases))
    connect()
    resources = _resources(search)
    _claim(search, folder)
    data = Path(search.run.data.path).resolve()
    console.print(_begin(search, resources), highlight=False, soft_wrap=True)
    trunks = open_trunks(segments(t.phases, t.run.train, data=data, seed=t.run.seed) for t in search.fixed)
    trial = partial(train_trial, search=search, folder=folder, data=data, trunks=trunks)
    with _tune_settings(), _saves_before_it_stops(trunks, console) as wish:
        grid = _tuner(search, folder, data, tune.with_resources(trial, resources)).fit()
    ray.kill(trunks)
    status = _write_results(search, folder, grid, was_told_to_stop=wish.made)
    if status == "stopped":
        again = f"{search.run.name} was stopped. The same command goes on from what is there: {folder.path}"
        console.print(again, highlight=False, soft_wrap=True)
        return EXIT_CODES[status]
    remove_unkept(folder.states)
    print_summary([folder.path], console, out=folder.path)
    console.print(f"report: {write_report([folder.path], folder.path)}", highlight=False, soft_wrap=True)
    return EXIT_CODES[status]


def _settings(run: RunConfig, space: SpaceConfig) -> dict[str, Any]:
    return {"run": to_tree(run), "space": to_tree(space)}


def _read_settings(file: Path) -> dict[str, Any]:
    """A search's settings, with keys that have come since at their defaults.

    Raises:
        ValueError: If the file is damaged, or has keys that are gone by now; names it.
    """
    tree = read_yaml(file)
    try:
        return _settings(build(RunConfig, tree.get("run"), "run"), build(SpaceConfig, tree.get("space"), "space"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_claim(search: Search, folder: SearchFolder) -> None:
    """Makes sure that the folder is this search's, or nobody's."""
    if not folder.settings.exists():
        if folder.path.exists():
            raise ValueError(f"{folder.path} holds something other than a search: choose another `name`")
        return
    now = _settings(search.run, search.space)
    for key, then, value in differences(_read_settings(folder.settings), now):
        if not key.startswith(CAN_CHANGE):
            raise ValueError(
                f"{folder.path} holds another search: {key} was {then!r} and is now {value!r}. Choose another `name`, "
                "or remove that folder to start over"
            )


def _claim(search: Search, folder: SearchFolder) -> None:
    """Makes the folder this search's. One that goes on has no results, whatever it had."""
    folder.path.mkdir(parents=True, exist_ok=True)
    replace_file(folder.settings, as_yaml(_settings(search.run, search.space)))
    for name in (RESULTS_FILE, COST_FILE):
        (folder.path / name).unlink(missing_ok=True)


def _resources(search: Search) -> dict[str, float]:
    """What Tune reserves for each trial; some node must have it."""
    trial = search.space.trial
    gpus = float(has_gpu()) if trial.gpus == "auto" else trial.gpus
    if gpus > 1:
        raise ValueError(f"space.trial.gpus={gpus:g}: a trial trains in a single process, which uses one GPU at most")
    wanted = {"CPU": trial.cpus} | ({"GPU": gpus} if gpus else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(_has(node, wanted) for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ValueError(
            f"space.trial: a trial asks for {trial.cpus:g} CPU and {gpus:g} GPU, which no node has ({have}): lower "
            "space.trial.cpus or space.trial.gpus"
        )
    return wanted


def _has(resources: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(resources.get(what, 0) >= amount for what, amount in wanted.items())


def _begin(search: Search, wanted: Mapping[str, float]) -> str:
    """What is about to happen, and where it must wait."""
    chosen = f", and {search.samples} that Optuna chooses" if search.samples else ""
    asked = " and ".join(f"{amount:g} {what}" for what, amount in wanted.items())
    line = f"{search.run.name}: {len(search.fixed)} trials{chosen}, each on {asked}"
    if _has(ray.available_resources(), wanted):
        return line
    return f"{line}. All of that is taken now: the first trial waits until there is room"


def _tuner(search: Search, folder: SearchFolder, data: Path, trial: Any) -> tune.Tuner:
    """A new Tune experiment, or the one that is there."""
    path = str(folder.path / TUNE_FOLDER)
    if tune.Tuner.can_restore(path) and list(Path(path).glob("experiment_state-*.json")):
        return tune.Tuner.restore(path, trial, resume_unfinished=True, resume_errored=True)
    return tune.Tuner(
        trial,
        tune_config=tune.TuneConfig(
            search_alg=chooser(search),
            scheduler=stopper(search, folder),
            num_samples=len(search.fixed) + search.samples,
            max_concurrent_trials=search.space.trial.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(folder.path),
            failure_config=tune.FailureConfig(max_failures=search.space.trial.max_failures),
            callbacks=[Told(search, data)],
            verbose=0,
        ),
    )


def _write_results(search: Search, folder: SearchFolder, grid: ResultGrid, *, was_told_to_stop: bool) -> str:
    """Writes results.json and cost.json, unless there is something left to do; returns how the search has ended."""
    tried, ended = grid._experiment_analysis.trials or [], 0
    rows: dict[str, dict[str, Any]] = {}
    for tune_trial in tried:
        trial = search.trial_of(tune_trial.config)
        run = folder.run(trial.name)
        if tune_trial.status == TuneTrial.ERROR:
            run.write_summary(trial.phases, Outcome("failed", _cause(tune_trial)))
        summary = json.loads(run.read("summary.json") or "{}")
        if tune_trial.last_result.get("failure"):  # also where the folder is another run's
            summary |= {"status": "failed"}
        # Tune calls all trials terminated when it has been told to end, and forgets who was done when it goes on
        ended += summary.get("status") in ("finished", "failed") or tune_trial.last_result.get("done", False)
        rows[trial.name] = {
            "name": trial.name,
            "values": trial.values,
            **{key: summary.get(key) for key in ("status", "val_loss", "flops", "tokens", "seconds")},
            "control": trial.control,
            "formula": trial.formula,
            "folder": f"trials/{trial.name}",
        }
    wanted = len(search.fixed) + search.samples if was_told_to_stop else len(tried)  # a space may have no more
    if ended < wanted:
        return "stopped"
    replace_file(folder.path / RESULTS_FILE, json.dumps(list(rows.values()), indent=2))
    flops = cost([search.trial_of(tune_trial.config) for tune_trial in tried], folder.states)
    replace_file(folder.path / COST_FILE, json.dumps(asdict(flops), indent=2))
    return "finished" if any(row["status"] == "finished" for row in rows.values()) else "failed"


def _cause(trial: TuneTrial) -> str:
    """The last line of what a trial has failed with."""
    lines = str(trial.get_error()).strip().splitlines()
    return lines[-1].strip() if lines else "its process was lost"


@contextmanager
def _tune_settings() -> Iterator[None]:
    """Sets what Tune reads from the environment, where nobody else has, and silences it."""
    for name in ("ray.tune", "optuna"):  # what matters is told in our words
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="optuna")  # of a search that goes on, Optuna has seen results before
    added = {key: value for key, value in SETTINGS.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]


@contextmanager
def _saves_before_it_stops(trunks: ActorHandle, console: Console) -> Iterator[StopWish]:
    """Has SIGTERM and Ctrl-C save what is in training, and end Tune then; says whether they came."""
    over = threading.Event()
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until Tune listens
    with stop_wish() as wish:
        watcher = threading.Thread(target=_save_then_end, args=(wish, over, trunks, console), daemon=True)
        watcher.start()
        try:
            yield wish
        finally:
            over.set()
            watcher.join()
            signal.signal(signal.SIGUSR1, before)


def _save_then_end(wish: StopWish, over: threading.Event, trunks: ActorHandle, console: Console) -> None:
    told = False
    while not over.wait(POLL_SECONDS):
        if not wish.made:
            continue
        if not told:
            told = True
            console.print("Saving what is in training, then stopping. Once more stops at once.", highlight=False)
        if not ray.get(trunks.stop.remote()):
            os.kill(os.getpid(), signal.SIGUSR1)  # how Tune is told from outside to save its state and end
