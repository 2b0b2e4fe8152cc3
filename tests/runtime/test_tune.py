"""Searches on Ray Tune: to their end, killed and taken up again, stopped early; what no cluster has room for."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_placement_groups

from raygrow.config import RunConfig, WorkersConfig
from tests.runtime.driver import driver, history, losses, settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray")]

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
SHARE = "plan.phases.base.share"
FACTOR = "plan.phases.stacked.growth.factor"
GRID = {"space": {SHARE: {"grid": [0.1, 0.2, 0.3]}, FACTOR: {"grid": [2, 4]}}, "control": True, "asha": None}


Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def words(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Words:
    """The words of a search over a run of seconds, in a folder."""
    run = replace(
        tiny,
        workers=WorkersConfig(),
        train=replace(tiny.train, evaluate_every=10),
        plan=replace(tiny.plan, tokens=40_000),
    )

    def made(space: dict[str, Any], folder: Path, *more: str) -> list[str]:
        file = tmp_path_factory.mktemp("space") / "mine.yaml"
        file.write_text(yaml.safe_dump(space))
        steps = [f"plan.phases.{phase}.steps=null" for phase in ("base", "stacked")]
        changed = replace(run, name=folder.name, storage_path=str(folder.parent))
        own = [word for word in settings(changed) if ".steps=" not in word]
        return ["tune", f"space={file}", *own, *steps, "plan.phases.base.share=0.2", *more]

    return made


@pytest.fixture(scope="module")
def undisturbed(ray: None, words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid's search, which nothing befell."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with driver(folder.parent, *words(GRID, folder)) as search:
        assert search.wait() == 0, search.said()
    assert "7 trials, each on 1 CPU" in search.said()
    assert "[7/7 ended, 100% of the FLOPs]" in search.said()
    assert "experiment" not in search.said()  # a word of Tune's
    return folder


def finished(folder: Path) -> dict[str, str]:
    """Histories of the trials that have ended. They hold times, so one that ran again would have another."""
    ended = [file.parent for file in folder.glob("trials/*/summary.json") if "finished" in file.read_text()]
    return {trial.name: (trial / "history.jsonl").read_text() for trial in ended}


def in_training(folder: Path) -> list[str]:
    """The trials that have begun and not ended."""
    return [
        file.parent.name for file in folder.glob("trials/*/history.jsonl") if file.parent.name not in finished(folder)
    ]


def saved_lines(folder: Path) -> set[tuple]:
    """What states hold: of every line, what it is of and the time, which would be another if it were trained again."""
    texts = []
    for file in folder.glob("states/*/step-*/history.jsonl"):
        with suppress(FileNotFoundError):  # states go when later ones are there
            texts.append(file.read_text())
    return _timed(line for text in texts for line in text.splitlines())


def told_lines(folder: Path) -> set[tuple]:
    """The same of the histories of trials."""
    return _timed(line for file in folder.glob("trials/*/history.jsonl") for line in file.read_text().splitlines())


def _timed(lines: Iterable[str]) -> set[tuple]:
    records = map(json.loads, lines)
    return {(line["phase"], line["step"], line["loss"], line["tokens_per_second"]) for line in records}


def best(folder: Path) -> dict[str, Any]:
    """The plan that a search recommends, but for its name."""
    return yaml.safe_load((folder / "best/plan/best.yaml").read_text()) | {"name": ""}


def assert_same(folder: Path, other: Path) -> None:
    """The same trials with the same losses, and the same best."""
    assert results(folder).keys() == results(other).keys()
    for name, row in results(folder).items():
        assert row["status"] == "finished"
        assert losses(folder / "trials" / name) == losses(other / "trials" / name)
    assert best(folder) == best(other)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def left_behind() -> list[Any]:
    """Trials' actors and reservations that are still there."""
    address = ray.get_runtime_context().gcs_address
    alive: list[Any] = list_actors(address, filters=[("state", "=", "ALIVE")])
    actors = [actor for actor in alive if actor.class_name in CLASSES]
    groups: list[Any] = list_placement_groups(address)
    return [*actors, *(group for group in groups if group.state in ("CREATED", "PENDING"))]


CLASSES = ("ImplicitFunc", "Trunks")


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 20
    while left := left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_a_search_tries_out_the_grid(undisturbed: Path) -> None:
    rows = results(undisturbed)
    assert len(rows) == 7
    assert {row["status"] for row in rows.values()} == {"finished"}
    assert [row["control"] for row in rows.values()].count(True) == 1
    assert (undisturbed / "report.html").exists()


def test_flops_spent_are_bases_once_and_the_rest_per_trial(undisturbed: Path) -> None:
    cost = json.loads((undisturbed / "cost.json").read_text())
    bases: dict[Any, float] = {}
    expected = alone = 0.0
    for row in results(undisturbed).values():
        ends = [line["flops"] for line in history(undisturbed / "trials" / row["name"]) if line["phase"] == "base"]
        base, factor = max(ends, default=0.0), row["values"].get(FACTOR)
        bases[factor] = max(base, bases.get(factor, 0.0))
        expected += row["flops"] - base
        alone += row["flops"]
    assert cost["spent"] == pytest.approx(expected + sum(bases.values()), rel=0.02)
    assert cost["spent"] == pytest.approx(cost["shared"])  # nothing was done twice
    assert cost["alone"] == pytest.approx(alone)
    assert cost["alone"] > 1.05 * cost["spent"]


def test_a_killed_search_goes_on_and_repeats_nothing(undisturbed: Path, words: Words, tmp_path: Path) -> None:
    folder = tmp_path / "runs/killed"
    with driver(tmp_path, *words(GRID, folder)) as search:
        before = search.until(lambda: len(finished(folder)) >= 2 and finished(folder))
        os.killpg(search.process.pid, signal.SIGKILL)
        search.process.wait()
    saved = saved_lines(folder)
    with driver(tmp_path, *words(GRID, folder)) as search:
        assert search.wait() == 0, search.said()
    assert before.items() <= finished(folder).items()
    assert saved <= told_lines(folder)
    assert_same(folder, undisturbed)
    assert_nothing_left()


@pytest.fixture
def own_ray_folder() -> Iterator[Path]:
    """Where a Ray that is not that of the tests has its files. In the usual place, each `ray.init` would join it."""
    with (
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def cluster(own_ray_folder: Path) -> Iterator[Cluster]:
    """Three machines, simulated: a head without room for trials, and two with a CPU each."""
    # how soon the head notices that a machine is lost; ten seconds and more by itself
    noticing = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, "_system_config": noticing}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def nodes_at_work(cluster: Cluster) -> set[str]:
    """The nodes on which trials are."""
    actors: list[Any] = list_actors(cluster.address, filters=[("state", "=", "ALIVE")])
    return {actor.node_id for actor in actors if actor.class_name == "ImplicitFunc"}


def test_a_lost_node_costs_its_trials_their_last_interval(
    undisturbed: Path, words: Words, cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "runs/lost"
    with driver(tmp_path, *words(GRID, folder), RAY_ADDRESS=str(cluster.address)) as search:
        search.until(lambda: len(nodes_at_work(cluster)) == 2)
        search.until(lambda: finished(folder) and len(in_training(folder)) == 2)
        before, saved = finished(folder), saved_lines(folder)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        assert search.wait() == 0, search.said()
    assert "has lost its process, and goes on from its last state" in search.said()
    assert before.items() <= finished(folder).items()
    assert saved <= told_lines(folder)
    assert_same(folder, undisturbed)


@pytest.fixture
def head(own_ray_folder: Path) -> Iterator[str]:
    """`ray start --head`, with the address that jobs are submitted to."""
    gcs, dashboard, agent, client = free_ports(4)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--port={gcs}"]
    ports = [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
    ]
    # jobs get the Python that Ray was started with; `ray stop` would stop every Ray of this machine
    environment = os.environ | {"PATH": f"{RAY.parent}:{os.environ['PATH']}"}
    with (own_ray_folder / "said.txt").open("w") as said:
        process = subprocess.Popen([*command, *ports], stdout=said, stderr=said, env=environment)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    try:
        while subprocess.run(
            [RAY, "job", "submit", "--address", address, "--", "true"], capture_output=True
        ).returncode:
            assert time.monotonic() < deadline
        yield address
    finally:
        process.terminate()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def test_a_job_gives_the_same_answer(undisturbed: Path, words: Words, head: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs/job"
    _, *settings_of_job = words(GRID, folder)
    job = [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--", "python", "jobs/tune.py"]
    said = subprocess.run([*job, *settings_of_job], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "[7/7 ended, 100% of the FLOPs]" in said.stdout
    assert_same(folder, undisturbed)


def test_stopping_early_leaves_nothing_behind(words: Words, tmp_path: Path) -> None:
    grid = {"plan.phases.stacked.lr": {"grid": [3e-3, 1e-6, 1e-7, 1e-8]}}
    space = {"space": grid, "asha": {"grace": 0.1, "reduction_factor": 2}}
    folder = tmp_path / "runs/early"
    with driver(tmp_path, *words(space, folder)) as search:
        assert search.wait() == 0, search.said()
    rows = results(folder)
    assert rows["scratch"]["status"] == "finished"
    stopped = [row for row in rows.values() if row["status"] == "stopped"]
    assert stopped
    assert all(row["flops"] < rows["scratch"]["flops"] for row in stopped)
    assert all((state / "KEEP").exists() for state in folder.glob("states/*/*step-*"))
    assert_nothing_left()


def test_a_search_that_is_told_to_stop_saves_what_is_in_training(words: Words, tmp_path: Path) -> None:
    space = {"search": "optuna", "samples": 1, "space": {SHARE: {"uniform": [0.1, 0.3]}}, "asha": None}
    folder = tmp_path / "runs/told"
    # nothing but the wish to stop saves in mid-segment
    told = words(space, folder, "plan.tokens=2e5", "train.checkpoint_every=1000")
    kept: dict[Path, list[dict[str, Any]]] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with driver(tmp_path, *told) as search:
            search.until(
                lambda had=kept: any(len(history(run)) > len(had.get(run, ())) for run in folder.glob("trials/*"))
            )
            search.process.send_signal(number)
            assert search.wait() == 143, search.said()
            assert "Saving what is in training" in search.said()
            assert "goes on from what is there" in search.said()
        assert not (folder / "results.json").exists()
        for run, lines in kept.items():  # the times too: nothing was trained again
            assert history(run)[: len(lines)] == lines
        kept = {run: history(run) for run in folder.glob("trials/*")}
        reasons = [json.loads((run / "summary.json").read_text())["reason"] for run in kept]
        assert any(reason.endswith("saved") for reason in reasons)
    with driver(tmp_path, *told) as search:
        assert search.wait() == 0, search.said()
    assert [row["status"] for row in results(folder).values()] == ["finished"] * 2
    for run, lines in kept.items():
        assert history(run)[: len(lines)] == lines


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trial": {"cpus": 99}}, "a trial asks for 99 CPU and 0 GPU, which no node has"),
        ({"trial": {"gpus": 2}}, "uses one GPU at most"),
        ({"space": {FACTOR: {"grid": [3]}}}, "growth factor=3 does not divide"),
    ],
)
def test_what_cannot_run_is_told_before_anything_starts(
    change: dict[str, Any], told: str, words: Words, tmp_path: Path
) -> None:
    with driver(tmp_path, *words(GRID | change, tmp_path / "runs/never")) as search:
        assert search.wait() == 2
        assert told in search.said()
    assert not (tmp_path / "runs").exists()


@ray.remote
class Other:
    """Someone else at work on the cluster."""


def test_a_search_that_must_wait_for_room_says_so(words: Words, tmp_path: Path) -> None:
    other: Any = Other.options(num_cpus=4).remote()
    ray.get(other.__ray_ready__.remote())
    with driver(tmp_path, *words(GRID, tmp_path / "runs/late")) as search:
        search.until(lambda: "the first trial waits until there is room" in search.said())
    ray.kill(other)
