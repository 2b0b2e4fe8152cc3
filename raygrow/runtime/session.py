"""A worker's link to its run under Ray Train."""

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import ray
import ray.train
from pyarrow import fs
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from raygrow.train.session import DONE, Record, checkpoint_name


class RaySession:
    """Checkpoints go through Ray Train, which resumes from them; metrics go to the run's history actor.

    On a shared file system checkpoints are written straight into the run's folder; for an object store each worker
    writes to a temporary folder that Ray uploads in the background.

    Args:
        phase: The phase in training.
        history: The run's history actor.
        downloads: Takes the checkpoints that are fetched from an object store, and removes them when it is closed.
    """

    def __init__(self, phase: str, history: ActorHandle, downloads: ExitStack) -> None:
        self._phase, self._history, self._downloads = phase, history, downloads
        context = ray.train.get_context()
        self._leads = context.get_world_rank() == 0
        storage = context.get_storage()
        assert storage, "a running Ray Train worker has storage"
        is_local = isinstance(storage.storage_filesystem, fs.LocalFileSystem)
        self._shared = Path(storage.experiment_fs_path) if is_local else None

    def resume_from(self) -> Path | None:
        """What Ray Train has recorded as this phase's newest checkpoint, else the newest that is marked as whole."""
        if checkpoint := ray.train.get_checkpoint():
            return Path(self._downloads.enter_context(checkpoint.as_directory()))
        if not self._shared:
            return None
        done = max(self._shared.glob(f"step-*/{DONE}"), default=None)
        # one worker looks for all: they must agree, and file systems may show them different folders
        name = broadcast_from_rank_zero(done and done.parent.name)
        if name is None:
            return None
        # the record was lost in a crash: enter the checkpoint again, or it would never be replaced by a newer one
        self.commit(self._shared / name, int(name.removeprefix("step-")))
        return self._shared / name

    def checkpoint_folder(self, step: int) -> Path:
        """In the run's folder, or a temporary one of this worker's."""
        if self._shared:
            return self._shared / checkpoint_name(step)
        return Path(tempfile.mkdtemp(prefix=f"raygrow-{checkpoint_name(step)}-"))

    def commit(self, folder: Path, step: int) -> None:
        """Marks the checkpoint as whole and hands it to Ray Train; the history up to it is written by then."""
        if self._leads:
            ray.get(self._history.flush.remote())
            (folder / DONE).touch()
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(os.fspath(folder)),
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD if self._shared else CheckpointUploadMode.ASYNC,
        )

    def log(self, record: Record) -> None:
        """Sends a line to the history actor without waiting for it."""
        self._history.append.remote(dict(record))

    def warn(self, text: str) -> None:
        """Has the driver print it."""
        self._history.tell.remote(text)

    def rewind(self, step: int) -> None:
        """Has the history actor drop what will be run again, and removes checkpoints that were never recorded."""
        ray.get(self._history.rewind.remote(self._phase, step))
        for folder in self._shared.glob("step-*") if self._shared else ():
            if folder.name > checkpoint_name(step) or not (folder / DONE).exists():
                shutil.rmtree(folder)

    def save_verification(self, verification: Record) -> None:
        """Has the history actor write the growth record."""
        ray.get(self._history.save_verification.remote(self._phase, dict(verification)))

    def stop_requested(self) -> bool:
        """Whether the driver asked for a stop (rank 0; the others leave it to rank 0)."""
        return self._leads and bool(ray.get(self._history.stop_requested.remote()))
