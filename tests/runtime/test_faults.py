"""Runs that are killed, stopped, or out of disk: each goes on, and ends with the losses of one that nothing befell.

Faults are real. A driver runs as a command in its own process, workers on the Ray of the tests; what a fault waits for
are files that the run writes.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raygrow.config import RunConfig, WorkersConfig
from raygrow.growth.gstack import Gstack
from raygrow.train.config import PhaseConfig, PlanConfig
from tests.runtime.driver import Driver, driver, history, losses, settings, train_workers

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray")]

STACKED = PhaseConfig(growth=Gstack(factor=2), steps=100)


@pytest.fixture(scope="session")
def run(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Long enough in its second phase for something to happen."""
    plan = PlanConfig(phases={"base": PhaseConfig(steps=30), "stacked": STACKED})
    return replace(tiny, plan=plan, storage_path=str(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="session")
def expected(ray: None, run: RunConfig) -> list[tuple]:
    """The losses of an uninterrupted run on two workers."""
    with driver(Path(run.storage_path) / "reference", *train(run, "reference")) as reference:
        assert reference.wait() == 0
    found = losses(Path(run.storage_path) / "reference")
    assert len(found) == 26
    return found


@pytest.fixture
def folder(run: RunConfig, request: pytest.FixtureRequest) -> Path:
    """Where the test's own run is."""
    return Path(run.storage_path) / request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture(scope="session")
def stopped(ray: None, run: RunConfig) -> Path:
    """A run that SIGTERM has stopped soon after its growth."""
    folder = Path(run.storage_path) / "stopped"
    with driver(folder, *train(run, folder.name)) as command:
        command.until((folder / "growth/stacked.json").exists)
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 143
        assert "Saving a checkpoint, then stopping." in command.said()
    return folder


def train(run: RunConfig, name: str, **changes: object) -> list[str]:
    return ["train", *settings(replace(run, name=name, **changes))]


def kill_worker(command: Driver) -> None:
    """SIGKILL for one worker; returns when its successors are there."""
    workers = set(train_workers())
    workers.copy().pop().kill()
    command.until(lambda: set(train_workers()) - workers)


def stacked_lines(folder: Path) -> int:
    return sum(line["phase"] == "stacked" for line in history(folder))


def half_written(folder: Path) -> list[Path]:
    return [step for step in folder.glob("phases/*/step-*") if not (step / "DONE").exists()]


def test_a_worker_is_killed_in_mid_phase(run: RunConfig, folder: Path, expected: list[tuple]) -> None:
    with driver(folder, *train(run, folder.name)) as command:
        command.until(lambda: stacked_lines(folder) >= 6)
        kill_worker(command)
        assert command.wait() == 0
        assert "stacked: going on from the checkpoint of step" in command.said()
    assert losses(folder) == expected


def test_a_worker_is_killed_right_after_growth(run: RunConfig, folder: Path, expected: list[tuple]) -> None:
    with driver(folder, *train(run, folder.name)) as command:
        command.until((folder / "growth/stacked.json").exists)
        kill_worker(command)
        assert command.wait() == 0
    assert losses(folder) == expected


def test_a_worker_is_killed_while_a_checkpoint_is_written(run: RunConfig, folder: Path, expected: list[tuple]) -> None:
    with driver(folder, *train(run, folder.name)) as command:
        command.until(lambda: stacked_lines(folder) >= 3 and half_written(folder))
        kill_worker(command)
        assert command.wait() == 0
    assert losses(folder) == expected
    assert not half_written(folder)


def test_the_driver_is_killed(run: RunConfig, folder: Path, expected: list[tuple]) -> None:
    with driver(folder, *train(run, folder.name)) as command:
        command.until(lambda: stacked_lines(folder) >= 8)
        command.process.kill()
        assert command.process.wait() == -signal.SIGKILL
    with driver(folder, *train(run, folder.name)) as command:
        assert command.wait() == 0
        assert "stacked: going on from the checkpoint of step" in command.said()
    assert losses(folder) == expected
    curves = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("loss")] == [line["tokens"] for line in history(folder)]
    assert len(list(folder.glob("phases/stacked/step-*"))) == run.train.keep_checkpoints


def test_sigterm_saves_a_checkpoint(stopped: Path) -> None:
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "stopped"
    last = history(stopped)[-1]
    assert last["phase"] == "stacked"
    assert last["step"] < STACKED.steps
    assert (stopped / f"phases/stacked/step-{last['step']:08d}/DONE").exists()
    assert not (stopped / "model").exists()


@pytest.mark.parametrize("workers", [2, 1, (1, 2)], ids=["two", "one", "one_or_two"])
def test_a_stopped_run_goes_on(
    workers: int | tuple[int, int], stopped: Path, run: RunConfig, folder: Path, expected: list[tuple]
) -> None:
    shutil.copytree(stopped, folder)
    change_name(folder)
    samples = history(folder)[-1]["tokens"]
    with driver(folder, *train(run, folder.name, workers=WorkersConfig(num=workers, use_gpu=False))) as command:
        assert command.wait() == 0
    lines = history(folder)
    assert [line["tokens"] for line in lines if line["tokens"] > samples] == list(
        range(samples + 5 * 512, (30 + 100) * 512 + 1, 5 * 512)
    )
    if workers == 1:
        assert_close(losses(folder), expected)
    else:
        assert losses(folder) == expected


def change_name(folder: Path) -> None:
    """A copied run is another run."""
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace("name: stopped", f"name: {folder.name}"))


def assert_close(found: list[tuple], expected: list[tuple]) -> None:
    """One worker adds up in another order than two, and training carries that on, from wherever it was stopped."""
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    for (*_, loss, score), (*_, expected_loss, expected_score) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=2e-4)
        assert score == (expected_score and pytest.approx(expected_score, abs=2e-4))


def test_a_list_of_checkpoints_is_cut_short(stopped: Path, run: RunConfig, folder: Path, expected: list[tuple]) -> None:
    shutil.copytree(stopped, folder)
    change_name(folder)
    file = folder / "phases/stacked/checkpoint_manager_snapshot.json"
    os.truncate(file, file.stat().st_size // 2)
    with driver(folder, *train(run, folder.name)) as command:
        assert command.wait() == 0
        assert "stacked: going on from the checkpoint of step" in command.said()
    assert losses(folder) == expected


def test_a_worker_is_lost_more_often_than_allowed(run: RunConfig, folder: Path) -> None:
    with driver(folder, *train(run, folder.name, workers=replace(run.workers, max_failures=0))) as command:
        command.until(lambda: len(history(folder)) >= 2)
        train_workers()[-1].kill()
        assert command.wait() == 1
        assert "failed for good: The actor is dead" in command.said()
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the first phase, but not for all of the second."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "raygrow-test", str(mounted)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_the_disk_fills_up(run: RunConfig, small_disk: Path, tmp_path: Path, expected: list[tuple]) -> None:
    words = train(run, "full", storage_path=str(small_disk))
    with driver(tmp_path, *words) as command:
        assert command.wait() == 1
        assert "stacked: the checkpoint of step" in command.said()
        assert re.search(r"it takes 2\.\d MB, and \d\.\d MB are free there", command.said())
    folder = small_disk / "full"
    assert not half_written(folder)
    assert not list(folder.glob("**/*.tmp*"))
    assert (folder / "phases/stacked/step-00000000/DONE").exists()

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    with driver(tmp_path, *words) as command:
        assert command.wait() == 0
    assert losses(folder) == expected


def test_a_diverged_run_keeps_its_last_checkpoint(run: RunConfig, folder: Path) -> None:
    plan = PlanConfig(phases={"base": PhaseConfig(steps=10), "stacked": replace(STACKED, lr=1e3)})
    with driver(folder, *train(run, folder.name, plan=plan)) as command:
        assert command.wait() == 1
        assert "stacked: at step" in command.said()
        assert "The last checkpoint before is kept" in command.said()
    assert (folder / "phases/stacked/step-00000000/DONE").exists()
    assert not half_written(folder)
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_what_is_wrong_for_good_is_not_tried_again_and_again(run: RunConfig, folder: Path, tmp_path: Path) -> None:
    data = replace(run.data, path=str(shutil.copytree(run.data.path, tmp_path / "data")))
    with driver(folder, *train(run, folder.name, data=data)) as command:
        command.until((folder / "run.yaml").exists)  # the driver has checked the data, workers have not
        os.truncate(tmp_path / "data/train-00000.bin", 1000)
        assert command.wait() == 1
        assert f"base: {tmp_path}/data/train-00000.bin: this shard has 1000 bytes" in command.said()
    assert not list(folder.glob("phases/*/step-*"))
