"""How a phase that has a source begins: weights and Adam's state taken over, or grown, and every growth verified.

Growth happens inside the workers. The source speaks first, on fixed tokens, and is freed; then the target is filled
from the source's checkpoint, one full tensor at a time, and must answer for itself before any training.
"""

import gc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from raygrow.nn.rack import Rack
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import TrainConfig
from raygrow.train.evaluation import Validation
from raygrow.train.optimizer import MOMENTS, ensure_state, state_tensors
from raygrow.train.parallel import build_sharded, fill, fill_from, local_part, reshard
from raygrow.train.plan import Phase
from raygrow.train.worker import Worker
from raygrow.weights.apply import apply_rules
from raygrow.weights.folder import open_folder
from raygrow.weights.rules import Rules, copy_rule
from raygrow.weights.verify import Check, Outputs, Verification, statistics_checks, tensor_statistics, verify

logger = logging.getLogger(__name__)

PROBE_SEQUENCES, PROBE_TOKENS = 2, 64
"""Size of the batch whose logits are compared before and after growth."""


@dataclass(frozen=True)
class Start:
    """How a phase began."""

    verification: Verification | None
    """Of the growth, where there was one."""
    seconds: float
    """Training time that the run had spent before."""


def start_from_source(
    phase: Phase,
    config: TrainConfig,
    model: Rack,
    optimizer: torch.optim.Optimizer,
    checkpoint: Path | None,
    validation: Validation,
    worker: Worker,
) -> Start:
    """Fills the model of a phase from its source: the folder in `init`, else the checkpoint of the phase before.

    Args:
        phase: The phase that begins.
        config: What the run's phases share.
        model: Its sharded model, not yet filled.
        optimizer: The model's optimizer.
        checkpoint: The last checkpoint of the phase before, where there was one.
        validation: Sequences on which the loss is compared before and after growth.
        worker: This worker.
    """
    weights = _weights(phase, checkpoint)
    parameters = dict(model.named_parameters())
    # a model folder holds no optimizer state
    state_from = checkpoint if phase.optimizer_state == "copy" and not phase.init else None
    if phase.growth is None:
        fill_from(parameters, weights)
        if state_from:
            _copy_optimizer_state({name: copy_rule(name) for name in parameters}, state_from, model, optimizer)
        return Start(None, _seconds(checkpoint))

    assert phase.source is not None
    before = _outputs_of_source(phase, config, weights, validation, worker)
    growth = phase.growth.grow(phase.source)
    for name, full in apply_rules(growth.rules, weights):
        fill(parameters[name], full)
    if state_from:
        _copy_optimizer_state(growth.rules, state_from, model, optimizer)
    verification = verify(
        before,
        _outputs(model, validation, worker),
        operator=asdict(phase.growth),
        exact=growth.exact,
        source=phase.source,
        target=phase.model,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        checks=_checks(phase, weights, parameters, worker),
        max_loss_jump=phase.max_loss_jump,
    )
    return Start(verification, _seconds(checkpoint))


def _weights(phase: Phase, checkpoint: Path | None) -> Mapping[str, Tensor]:
    if phase.init:
        return open_folder(phase.init).tensors
    assert checkpoint, "a phase with a source has a phase before it or an init folder"
    return CheckpointTensors(checkpoint, "model.")


def _seconds(checkpoint: Path | None) -> float:
    return CheckpointTensors(checkpoint, "progress.")["seconds"].item() if checkpoint else 0.0


def _outputs(model: Rack, validation: Validation, worker: Worker) -> Outputs:
    with torch.no_grad():
        logits_BTV = model(validation.probe(PROBE_SEQUENCES, PROBE_TOKENS).to(worker.device)).cpu()
    reshard(model)
    return Outputs(logits_BTV=logits_BTV, loss=validation.loss(model, worker))


def _outputs_of_source(
    phase: Phase, config: TrainConfig, weights: Mapping[str, Tensor], validation: Validation, worker: Worker
) -> Outputs:
    """What the source says. Its model lives only as long as this call."""
    assert phase.source is not None
    # run as written: compiling a model for two batches costs more than it saves
    source = build_sharded(phase.source, replace(config, compile="off"), worker.mesh, worker.device)
    fill_from(dict(source.named_parameters()), weights)
    outputs = _outputs(source, validation, worker)
    del source
    gc.collect()  # FSDP's hooks and modules refer to each other, so the memory would stay taken
    return outputs


def _copy_optimizer_state(rules: Rules, checkpoint: Path, model: Rack, optimizer: torch.optim.Optimizer) -> None:
    """Grows Adam's moments by the rules of the weights; the step count of each goes along.

    Moments under a wrong step count would be over- or undercorrected in the first updates.
    """
    ensure_state(optimizer)
    state = state_tensors(model, optimizer)
    steps = CheckpointTensors(checkpoint, "step.")
    # parameters that were frozen in the phase before have no state to go on from
    known = {name: rules[name] for name in state["step"] if all(source in steps for source in rules[name].sources)}
    if len(known) < len(state["step"]):
        logger.info("%d parameters were not trained before: Adam starts afresh there", len(state["step"]) - len(known))
    for key in MOMENTS:
        for name, full in apply_rules(known, CheckpointTensors(checkpoint, f"{key}.")):
            fill(state[key][name], full)
    for name, rule in known.items():
        fill(state["step"][name], steps[rule.sources[0]])


def _checks(
    phase: Phase, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor], worker: Worker
) -> list[Check]:
    """The operator's own checks and those of the tensors' values, over all workers' shards."""
    assert phase.growth is not None
    local = {name: local_part(parameter.detach()) for name, parameter in parameters.items()}
    checks = [_agreed(check, worker) for check in phase.growth.checks(_LocalParts(weights, parameters), local.items())]
    names, statistics = tensor_statistics(local.items())
    total = torch.tensor(worker.sum(*statistics.flatten())).reshape(statistics.shape)
    return checks + statistics_checks(names, total, phase.model)


def _agreed(check: Check, worker: Worker) -> Check:
    """The check as all workers see it: passed where every one of them passed it."""
    failures = int(worker.sum(not check.passed)[0])
    if not failures or not check.passed:
        return check
    return replace(check, passed=False, detail=f"{failures} other workers found their shards to differ")


class _LocalParts(Mapping[str, Tensor]):
    """The source's tensors, each cut as the target's tensor of the same name is cut over the workers."""

    def __init__(self, weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        self._weights, self._like = weights, like

    def __getitem__(self, name: str) -> Tensor:
        like = self._like[name]
        assert isinstance(like, DTensor), "parameters of a sharded model"
        full = self._weights[name].to(like.dtype)
        return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
