"""A worker's link to its run under Ray Train."""

import os
import shutil
import tempfile
from pathlib import Path

import ray
import ray.train
from pyarrow import fs
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode

from raygrow.train.session import Record

DONE = "DONE"
"""Marker file of a whole checkpoint."""


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def local_folder(checkpoint: Checkpoint) -> Path:
    """The checkpoint as a local folder; downloaded where it is in an object store."""
    if isinstance(checkpoint.filesystem, fs.LocalFileSystem):
        return Path(checkpoint.path)
    return Path(checkpoint.to_directory())


class RaySession:
    """Checkpoints go through Ray Train, which resumes from them; metrics go to the run's history actor.

    On a shared file system checkpoints are written straight into the run's folder; for an object store each worker
    writes to a temporary folder that Ray uploads.
    """

    def __init__(self, phase: str, history: ActorHandle) -> None:
        self._phase, self._history = phase, history
        self._answer: ray.ObjectRef | None = None
        self._context = ray.train.get_context()
        storage = self._context.get_storage()
        assert storage, "a running Ray Train worker has storage"
        is_local = isinstance(storage.storage_filesystem, fs.LocalFileSystem)
        self._shared = Path(storage.experiment_fs_path) if is_local else None

    def resume_from(self) -> Path | None:
        """What Ray Train has recorded as this phase's newest checkpoint, else the newest that is marked as whole."""
        if checkpoint := ray.train.get_checkpoint():
            return local_folder(checkpoint)
        done = sorted(self._shared.glob(f"step-*/{DONE}")) if self._shared else []
        if not done:
            return None
        # the record was lost in a crash: enter the checkpoint again, or it would never be replaced by a newer one
        folder = done[-1].parent
        self.commit(folder, int(folder.name.removeprefix("step-")))
        return folder

    def checkpoint_folder(self, step: int) -> Path:
        """In the run's folder, or a temporary one of this worker's."""
        if self._shared:
            return self._shared / checkpoint_name(step)
        return Path(tempfile.mkdtemp(prefix=f"raygrow-{checkpoint_name(step)}-"))

    def commit(self, folder: Path, step: int) -> None:
        """Marks the checkpoint as whole and hands it to Ray Train."""
        if self._context.get_world_rank() == 0:
            (folder / DONE).touch()
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(os.fspath(folder)),
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD if self._shared else CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=None if self._shared else True,
        )

    def log(self, record: Record) -> None:
        """Sends a line to the history actor without waiting for it."""
        self._answer = self._history.append.remote(dict(record))

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
        """What the history actor answered to the last line (rank 0; others leave it to rank 0)."""
        return self._answer is not None and ray.get(self._answer)
