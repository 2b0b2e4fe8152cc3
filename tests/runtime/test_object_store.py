"""A run whose folder is in an object store: an S3 server on this machine."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from raygrow.config import RunConfig
from raygrow.runtime.run_folder import RunFolder
from raygrow.train.config import PlanConfig
from tests.runtime.driver import driver, settings

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray")]

SECRETS = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def storage_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    command = [sys.executable, "-m", "moto.server", "-p", address.split(":")[1]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        store = fs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True)
        for _ in range(600):
            try:
                store.create_dir("bucket")
                break
            except OSError:
                time.sleep(0.1)
        yield f"s3://bucket/runs?region=us-east-1&scheme=http&endpoint_override={address}"
    finally:
        server.terminate()
        server.wait()


def test_a_run_is_stopped_and_goes_on(tiny: RunConfig, storage_path: str, tmp_path: Path) -> None:
    folder = RunFolder.of(storage_path, "remote")
    phases = tiny.plan.phases | {"stacked": replace(tiny.plan.phases["stacked"], steps=60, save_start="grown")}
    words = settings(replace(tiny, name="remote", storage_path=storage_path, plan=PlanConfig(phases=phases)))
    # a Ray of its own, whose workers know the secrets
    with driver(tmp_path, "train", *words, RAY_ADDRESS="local") as command:
        command.until(lambda: folder.read("growth/stacked.json"))
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 143
    with driver(tmp_path, "train", *words, RAY_ADDRESS="local") as command:
        assert command.wait() == 0
        assert "s3://bucket/runs/remote/report.html" in command.said()

    lines = folder.read_history()
    assert [(line["phase"], line["step"]) for line in lines] == [
        (phase, step) for phase, steps in (("base", 20), ("stacked", 60)) for step in range(5, steps + 1, 5)
    ]
    assert json.loads(folder.read("summary.json") or "")["status"] == "finished"
    for model in ("model", "models/grown"):
        assert json.loads(folder.read(f"{model}/config.json") or "")["model"]["blocks_per_stack"] == 2
    assert folder.read("models/training_history.jsonl") == folder.read("history.jsonl")
    assert "<svg" in (folder.read("report.html") or "")
    assert {"loss.png", "report.html", "run.yaml", "summary.json"} <= set(folder.names())
    assert folder.names("tensorboard")
