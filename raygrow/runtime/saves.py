"""The model folders that a plan asks for, `models/<name>` in the run's folder, and its history beside them.

The driver writes them from checkpoints of finished phases, which are kept for good: the model that a phase begins with
follows from the last one before it and the growth's rules. So a save that a crash prevented is made up for when the
run is started again.
"""

from contextlib import ExitStack
from pathlib import Path

from ray.train import Checkpoint
from rich.console import Console

from raygrow.config import RunConfig
from raygrow.data.shards import TOKENIZER_FOLDER
from raygrow.runtime.run_folder import HISTORY_FILE, RunFolder
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import SAVED_HISTORY
from raygrow.train.plan import Phase
from raygrow.train.start import start_tensors

MODELS_FOLDER = "models"


class Saves:
    """Writes the model folders of one run.

    Args:
        run: Its configuration.
        folder: Its folder.
        console: Told of every folder written.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, console: Console) -> None:
        self._run, self._folder, self._console = run, folder, console

    def start(self, phase: Phase, before: Checkpoint | None) -> None:
        """Saves the model as a phase begins, if that was asked for and has not been done.

        Args:
            phase: The phase.
            before: Last checkpoint of the phase before it, if there is one.
        """
        if name := self._missing(phase.save_start):
            with ExitStack() as stack:
                weights = Path(stack.enter_context(before.as_directory())) if before else None
                tensors = start_tensors(phase, weights, self._run.seed)
                self._folder.write_model(phase.model, tensors, tokenizer=self._tokenizer, name=name)
            self._tell(phase, name)

    def end(self, phase: Phase, checkpoint: Checkpoint) -> None:
        """Saves the model as a phase ends, from its last checkpoint, if that was asked for and has not been done."""
        if name := self._missing(phase.save_end):
            self.write(phase, checkpoint, name)
            self._tell(phase, name)

    def write(self, phase: Phase, checkpoint: Checkpoint, name: str) -> None:
        """Writes the model of a checkpoint as the folder `name` of the run's."""
        with checkpoint.as_directory() as weights:
            tensors = CheckpointTensors(Path(weights), "model.")
            self._folder.write_model(phase.model, tensors.items(), tokenizer=self._tokenizer, name=name)

    def history(self) -> None:
        """Copies the run's history, if its plan saves anything."""
        if any(phase.save_start or phase.save_end for phase in self._run.plan.phases.values()):
            self._folder.write(f"{MODELS_FOLDER}/{SAVED_HISTORY}", self._folder.read(HISTORY_FILE) or "")

    @property
    def _tokenizer(self) -> Path:
        return Path(self._run.data.path) / TOKENIZER_FOLDER

    def _missing(self, name: str | None) -> str | None:
        """Where in the run's folder a model still has to be written, if so."""
        place = name and f"{MODELS_FOLDER}/{name}"
        return place if place and self._folder.read(f"{place}/config.json") is None else None

    def _tell(self, phase: Phase, name: str) -> None:
        self._console.print(f"{phase.name}: saved {name}", highlight=False)
