"""A run's folder: the same on a disk and in an object store, and nothing in it is ever half there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from ray.train import Checkpoint

from raygrow.config import RunConfig, WorkersConfig, from_yaml
from raygrow.data.shards import MANIFEST_FILE, TOKENIZER_FOLDER
from raygrow.nn.init import initial_value
from raygrow.runtime.run_folder import RunFolder
from raygrow.train.loop import Outcome
from raygrow.train.plan import resolve
from raygrow.weights.folder import open_folder
from raygrow.weights.shapes import parameter_shapes


@pytest.fixture(params=["path", "file uri", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run's folder in each kind of place. The object store is a disk behind pyarrow's remote interface."""
    if request.param == "path":
        return RunFolder.of(str(tmp_path), "run")
    if request.param == "file uri":
        return RunFolder.of(tmp_path.as_uri(), "run")
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (tmp_path / "bucket/run/growth").mkdir(parents=True)  # object stores have no folders to make first
    monkeypatch.setattr(RunFolder, "resolve", lambda self, name: (remote, f"bucket/run/{name}".rstrip("/")))
    return RunFolder.of("s3://bucket", "run")


def test_files_are_written_whole(folder: RunFolder) -> None:
    assert folder.read("history.jsonl") is None
    folder.write("history.jsonl", "one\n")
    folder.write("history.jsonl", "two\n")
    assert folder.read("history.jsonl") == "two\n"


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.of("runs", "a").local == tmp_path / "runs/a"
    assert RunFolder.of(tmp_path.as_uri(), "a").local == tmp_path / "a"
    assert RunFolder.of("s3://bucket/runs/", "a").uri == "s3://bucket/runs/a"
    assert RunFolder.of("s3://bucket/runs?region=here", "a").phases_uri == "s3://bucket/runs/a/phases?region=here"
    assert RunFolder.of("runs", "a").phases_uri == str(tmp_path / "runs/a/phases")


def test_a_name_belongs_to_one_configuration(folder: RunFolder, tiny: RunConfig) -> None:
    folder.claim(tiny)
    assert from_yaml(folder.read("run.yaml") or "") == tiny
    folder.claim(replace(tiny, workers=WorkersConfig(num=1)))  # what may change
    with pytest.raises(ValueError, match=r"model\.d_ff was 128 and is now 64"):
        folder.claim(replace(tiny, model=replace(tiny.model, d_ff=64)))


def test_a_run_learns_from_one_text(folder: RunFolder, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for content in ("{}", "{}", '{"other": 1}'):
        (data / MANIFEST_FILE).write_text(content)
        if content == "{}":
            folder.claim_data(str(data))
    with pytest.raises(ValueError, match=r"a run on other data than .*data holds now"):
        folder.claim_data(str(data))


def test_history_leaves_out_what_a_crash_cut_short(folder: RunFolder) -> None:
    folder.write("history.jsonl", '{"step": 1}\n{"step": 2}\n{"st')
    assert folder.read_history() == [{"step": 1}, {"step": 2}]


def test_finished_phases_are_found_again(folder: RunFolder, tmp_path: Path) -> None:
    assert folder.finished_phase("base") is None
    (tmp_path / "part").write_text("content")
    folder.upload(tmp_path / "part", "phases/base/step-00000010/part")
    folder.finish_phase("base", Checkpoint("base/step-00000010", fs.LocalFileSystem()))
    found = folder.finished_phase("base")
    assert found
    with found.as_directory() as local:
        assert (Path(local) / "part").read_text() == "content"


def test_models_appear_under_their_names(folder: RunFolder, tiny: RunConfig, tmp_path: Path) -> None:
    shapes = parameter_shapes(tiny.model)
    weights = {name: initial_value(name, shape, tiny.model, 0) for name, shape in shapes.items()}
    folder.write_model(tiny.model, weights.items(), tokenizer=Path(tiny.data.path) / TOKENIZER_FOLDER, name="models/a")
    found = open_folder(next(tmp_path.rglob("models/a")))
    assert found.config == tiny.model
    assert all(torch.equal(found.tensors[name], weight) for name, weight in weights.items())
    assert {"config.json", "tokenizer.json"} <= set(folder.names("models/a"))


def test_records_are_the_runs_small_files(folder: RunFolder) -> None:
    for name in ("run.yaml", "history.jsonl", "growth/stacked.json"):
        folder.write(name, name)
    with folder.records() as local:
        assert local.name == "run"
        assert (local / "growth/stacked.json").read_text() == "growth/stacked.json"
        assert (local / "history.jsonl").exists()
    folder.remove("history.jsonl")
    assert folder.names() == ["run.yaml"]


def test_a_list_of_checkpoints_that_was_cut_short_is_removed(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "run")
    folder.mend_phase("base")
    name = "phases/base/checkpoint_manager_snapshot.json"
    folder.write(name, '{"whole": true}')
    folder.mend_phase("base")
    assert folder.read(name)
    folder.write(name, '{"who')
    folder.mend_phase("base")
    assert folder.read(name) is None


def test_summary(folder: RunFolder, tiny: RunConfig) -> None:
    phases = resolve(tiny.plan, tiny.model, tiny.train)
    lines = [
        {"phase": "base", "step": 20, "tokens": 10240, "flops": 1e9, "seconds": 1.0, "loss": 5.0, "val_loss": 5.1},
        {"phase": "stacked", "step": 5, "tokens": 12800, "flops": 2e9, "seconds": 1.5, "loss": 4.0},
    ]
    folder.write("history.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    folder.write_summary(phases, Outcome("stopped", "asked to"))
    assert not folder.is_finished()
    summary = json.loads(folder.read("summary.json") or "")
    assert (summary["status"], summary["reason"], summary["tokens"]) == ("stopped", "asked to", 12800)
    base, stacked = summary["phases"]
    assert (base["n_blocks"], base["val_loss"]) == (2, 5.1)
    assert (stacked["n_blocks"], stacked["tokens"], stacked["val_loss"]) == (4, 2560, None)

    folder.write_summary(phases, Outcome("finished"))
    assert folder.is_finished()
