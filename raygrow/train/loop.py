"""Training one phase, from its first step (or its newest checkpoint) to its last.

Everything that needs the workers to agree happens at report steps, in one small all-reduce: the loss, whether to stop,
whether the checkpoint being written is on disk. The steps between are never waited for.
"""

import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from raygrow.data.sampler import Sampler
from raygrow.data.shards import open_tokens
from raygrow.nn.loss import Loss, add_losses
from raygrow.train.batches import batches
from raygrow.train.checkpoint import AsyncSaver, Progress, load, state_table
from raygrow.train.config import TrainConfig
from raygrow.train.evaluation import Validation
from raygrow.train.optimizer import adamw, set_learning_rate
from raygrow.train.parallel import build_sharded, fill_initial, freeze
from raygrow.train.plan import Phase
from raygrow.train.probes import divergences, still_together
from raygrow.train.schedule import learning_rate
from raygrow.train.session import Session
from raygrow.train.start import start_from_source
from raygrow.train.step import figures, loss_of_sums, train_step
from raygrow.train.worker import Worker, set_determinism

logger = logging.getLogger(__name__)

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a phase ended. `stopped` was asked for and can go on; `failed` would only fail again."""

    status: Status
    reason: str = ""


def train_phase(
    phase: Phase,
    config: TrainConfig,
    *,
    data: Path,
    seed: int,
    source: Path | None,
    session: Session,
    device: str,
    until: int | None = None,
    save_at: Collection[int] = (),
) -> Outcome:
    """Trains one phase on this worker. Every worker of the group calls it with the same arguments.

    Args:
        phase: What to train.
        config: What the run's phases share.
        data: Prepared data folder.
        seed: Of initial weights and data order.
        source: Last checkpoint of the phase before, where the phase starts from one.
        session: The link to the run.
        device: `cpu` or `cuda:<i>`.
        until: Last step to train, where that is before the phase's end.
        save_at: Steps to evaluate and save at too, multiples of `report_every`.

    Returns:
        How it ended; a failed verification or a diverged loss is an outcome, not an exception, since a retry would
        not help.
    """
    set_determinism(deterministic=config.deterministic)
    worker = Worker.join(torch.device(device))
    run = _PhaseRun(
        phase,
        config,
        data=data,
        seed=seed,
        session=session,
        worker=worker,
        last_step=until or phase.steps,
        save_at=save_at,
    )
    failure = run.start(source)
    return Outcome("failed", failure) if failure else run.train()


@dataclass
class _Window:
    """The steps since the last report."""

    first_step: int
    losses: list[Loss] = field(default_factory=list)
    """Of this worker's tokens, step by step, on the device."""
    clock: float = field(default_factory=time.perf_counter)


class _PhaseRun:
    """The state of a phase in training on one worker."""

    def __init__(
        self,
        phase: Phase,
        config: TrainConfig,
        *,
        data: Path,
        seed: int,
        session: Session,
        worker: Worker,
        last_step: int,
        save_at: Collection[int],
    ) -> None:
        self.phase, self.config, self.session, self.worker, self.seed = phase, config, session, worker, seed
        self.last_step, self.save_at = last_step, save_at
        self.micro_batch_size = phase.micro_batch_rows(worker.count)
        self.model = build_sharded(phase.model, config, worker.mesh, worker.device)
        freeze(self.model, phase.frozen)
        self.optimizer = adamw(self.model, config.optimizer)
        self.sampler = Sampler(
            open_tokens(data, "train", verify=False), seq_len=phase.seq_len, window=config.seq_len, seed=seed
        )
        self.validation = Validation(
            data,
            sequences=config.evaluate_sequences,
            seq_len=phase.seq_len,
            batch_size=self.micro_batch_size,
        )
        self.saver = AsyncSaver()
        self.progress = Progress()

    def start(self, source: Path | None) -> str | None:
        """Fills the model: from this phase's checkpoint, from its source, or fresh. Returns why it cannot, if so."""
        checkpoint = self.session.resume_from()
        if checkpoint:
            self.progress = load(checkpoint, self.model, self.optimizer)
            if self.worker.rank == 0:
                self.session.rewind(self.progress.step)
                logger.info("%s: resumed at step %d from %s", self.phase.name, self.progress.step, checkpoint)
            return None
        if self.worker.rank == 0:
            self.session.rewind(0)
        if self.phase.source is None:
            fill_initial(self.model, self.phase.model, self.seed)
            return None
        start = start_from_source(
            self.phase, self.config, self.model, self.optimizer, source, self.validation, self.worker
        )
        self.progress.seconds = start.seconds
        if start.verification and self.worker.rank == 0:
            self.session.save_verification(start.verification.to_json())
        if start.verification and start.verification.failure:
            return f"{self.phase.name}: {start.verification.failure}"
        # growth is never repeated: a restart finds this
        self._save()
        return self._commit()

    def train(self) -> Outcome:
        """Runs the steps that are left."""
        phase = self.phase
        steps = range(self.progress.step, self.last_step)
        step_batches = batches(
            self.sampler,
            first_sample=phase.first_sample,
            batch_size=phase.batch_size,
            steps=steps,
            rank=self.worker.rank,
            workers=self.worker.count,
            device=self.worker.device,
        )
        window = _Window(steps.start)
        for step, batch in zip(steps, step_batches, strict=True):
            lr = learning_rate(step, steps=phase.steps, peak=phase.lr, schedule=phase.schedule)
            set_learning_rate(self.optimizer, lr)
            loss, norm = train_step(
                self.model,
                self.optimizer,
                batch,
                micro_batch_size=self.micro_batch_size,
                step_tokens=phase.step_tokens,
                workers=self.worker.count,
                clip=self.config.optimizer.clip,
                load_balancing=self.config.load_balancing,
                activation_l1=phase.activation_l1,
            )
            window.losses.append(loss)
            self.progress.step = step + 1
            if self._is_due(self.config.report_every):
                outcome = self._report_step(window, grad_norm=norm.item(), lr=lr)
                if outcome:
                    return outcome
                window = _Window(self.progress.step)
        return Outcome("finished")

    def _report_step(self, window: "_Window", *, grad_norm: float, lr: float) -> Outcome | None:
        """Where the workers agree: loss, stop, checkpoint. Returns how the phase ends, if it ends here."""
        steps = self.progress.step - window.first_step
        tokens = steps * self.phase.step_tokens
        own = add_losses(window.losses)
        stop, written, *sums = self.worker.sum(
            self.session.stop_requested(), self.saver.is_written(), *(part for part in own if part is not None)
        )
        total = loss_of_sums(own, sums)
        loss = total.nats.item() / tokens
        seconds = time.perf_counter() - window.clock
        self.progress.seconds += seconds
        if problem := self._divergence(loss, grad_norm):
            # a checkpoint still being written is from an earlier report, when all was well
            return Outcome("failed", problem if self.saver.idle else self._commit() or problem)
        self.progress.lowest_loss = min(self.progress.lowest_loss, loss)
        more = figures(total, tokens=tokens)
        self._log(loss=loss, grad_norm=grad_norm, lr=lr, tokens_per_second=tokens / seconds, **more)
        if problem := self._checkpoint(written=written == self.worker.count, stop=bool(stop)):
            return Outcome("failed", problem)
        if stop and self.progress.step < self.last_step:
            return Outcome(
                "stopped", f"{self.phase.name}: stopped at step {self.progress.step} of {self.phase.steps}, saved"
            )
        return None

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step % every == 0 or step == self.last_step or step in self.save_at

    def _divergence(self, loss: float, norm: float) -> str | None:
        """Why training must stop, if the loss or gradient has gone bad."""
        where = f"{self.phase.name}: at step {self.progress.step}"
        kept = (
            "The last checkpoint before is kept. Lower the learning rate or lengthen the warmup, "
            "and start under another name."
        )
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"{where} the loss is {loss:.4g} and the gradient norm {norm:.4g}. {kept}"
        limit = self.progress.lowest_loss + self.config.diverged_above
        if loss > limit:
            return (
                f"{where} the loss is {loss:.4g}, more than train.diverged_above={self.config.diverged_above:g} "
                f"above its lowest, {self.progress.lowest_loss:.4g}. {kept}"
            )
        return None

    def _log(self, *, loss: float, grad_norm: float, lr: float, tokens_per_second: float, **more: float) -> None:
        """One line of history, with the evaluation's figures where one is due."""
        phase, step = self.phase, self.progress.step
        scores: dict[str, float] = {}
        if self._is_due(self.config.evaluate_every):
            scores = self.validation.scores(self.model, self.worker) | divergences(self.model, phase)
        peak = self.worker.peak_flops()
        record = {
            "phase": phase.name,
            "step": step,
            "tokens": phase.tokens_before + step * phase.step_tokens,
            "flops": phase.flops_before + step * phase.step_tokens * phase.flops_per_token,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "mfu": peak and tokens_per_second * phase.flops_per_token / peak,
            "memory_bytes": self.worker.peak_memory(),
            "seconds": self.progress.seconds,
            **more,
            **scores,
        }
        if self.worker.rank == 0:
            self.session.log(record)
            if step == phase.steps and (problem := still_together(phase, scores)):
                self.session.warn(problem)

    def _checkpoint(self, *, written: bool, stop: bool) -> str | None:
        """Commits the checkpoint being written once it is on disk, and starts the next where one is due.

        Returns why it could not be written, if so.
        """
        due = stop or self._is_due(self.config.checkpoint_every)
        if not self.saver.idle and (written or due) and (problem := self._commit()):
            return problem
        if due:
            self._save()
        is_last = self.progress.step == self.last_step or stop
        return self._commit() if is_last else None

    def _save(self) -> None:
        table = state_table(self.model, self.optimizer, self.progress)
        self.saver.start(table, self.session.checkpoint_folder(self.progress.step), self.progress.step)

    def _commit(self) -> str | None:
        try:
            folder, step = self.saver.finish()
        except OSError as error:
            return f"{self.phase.name}: {error}"
        self.session.commit(folder, step)
        return None
