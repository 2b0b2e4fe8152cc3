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

from raygrow.growth.growth import Growth
from raygrow.nn.init import initial_value
from raygrow.nn.rack import Rack
from raygrow.train.checkpoint import CheckpointTensors
from raygrow.train.config import TrainConfig
from raygrow.train.evaluation import Validation
from raygrow.train.optimizer import MOMENTS, ensure_state, state_tensors
from raygrow.train.outputs import outputs
from raygrow.train.parallel import build_sharded, fill, fill_from, local_part, part_of
from raygrow.train.plan import Phase
from raygrow.train.worker import Worker
from raygrow.weights.apply import apply_rules
from raygrow.weights.checks import Check, inherited_zeros, meant_zeros, none_of, statistics_checks, tensor_statistics
from raygrow.weights.folder import open_folder
from raygrow.weights.moments import Policy, moment_rules
from raygrow.weights.rules import Rules, Sliceable, copy_rule, take
from raygrow.weights.shapes import parameter_shapes
from raygrow.weights.verify import Outputs, Verification, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """How a phase began."""

    verification: Verification | None
    """Of the growth, where there was one."""
    seconds: float
    """Training time that the run had spent before."""


def start_tensors(phase: Phase, checkpoint: Path | None, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model as a phase begins, one at a time: the same that its workers start with.

    Args:
        phase: The phase.
        checkpoint: The last checkpoint of the phase before, where there was one.
        seed: Of the run, for a model that starts afresh.
    """
    if phase.source is None:
        shapes = parameter_shapes(phase.model)
        return ((name, initial_value(name, shape, phase.model, seed)) for name, shape in shapes.items())
    weights = _weights(phase, checkpoint, torch.device("cpu"))
    return apply_rules(phase.growth.grow(phase.source).rules, weights) if phase.growth else iter(weights.items())


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
    weights = _weights(phase, checkpoint, worker.device)
    parameters = dict(model.named_parameters())
    # a model folder holds no optimizer state
    state_from = None if phase.init or phase.optimizer_state == "drop" else checkpoint
    if phase.growth is None:
        fill_from(parameters, weights)
        if state_from:
            copies = {name: copy_rule(name) for name in parameters}
            _take_optimizer_state(copies, "copy", state_from, model, optimizer, worker)
        return Start(None, _seconds(checkpoint))

    assert phase.source is not None
    before = _outputs_of_source(phase, config, weights, validation, worker)
    growth = phase.growth.grow(phase.source)
    for name, full in apply_rules(growth.rules, weights):
        fill(parameters[name], full)
    if state_from:
        policy: Policy = "asymmetric" if phase.optimizer_state == "asymmetric" else "copy"
        _take_optimizer_state(growth.rules, policy, state_from, model, optimizer, worker)
    verification = verify(
        before,
        outputs(model, validation, config, worker),
        operator=asdict(phase.growth),
        exact=growth.exact,
        origins=growth.origins,
        source=phase.source,
        target=phase.model,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        checks=_tensor_checks(growth, weights, parameters, worker),
        max_loss_jump=phase.max_loss_jump,
    )
    return Start(verification, _seconds(checkpoint))


def _weights(phase: Phase, checkpoint: Path | None, device: torch.device) -> Mapping[str, Tensor]:
    if phase.init:
        return _AsTrained(open_folder(phase.init).tensors, device)
    assert checkpoint, "a phase with a source has a phase before it or an init folder"
    return _AsTrained(CheckpointTensors(checkpoint, "model."), device)


def _seconds(checkpoint: Path | None) -> float:
    return CheckpointTensors(checkpoint, "progress.")["seconds"].item() if checkpoint else 0.0


def _outputs_of_source(
    phase: Phase, config: TrainConfig, weights: Mapping[str, Tensor], validation: Validation, worker: Worker
) -> Outputs:
    """What the source says. Its model lives only as long as this call."""
    assert phase.source is not None
    uncompiled = replace(config, compile="off")
    source = build_sharded(phase.source, uncompiled, worker.mesh, worker.device)
    fill_from(dict(source.named_parameters()), weights)
    said = outputs(source, validation, uncompiled, worker)
    del source
    gc.collect()  # FSDP's hooks and modules refer to each other, so the memory would stay taken
    return said


def _take_optimizer_state(
    rules: Rules, policy: Policy, checkpoint: Path, model: Rack, optimizer: torch.optim.Optimizer, worker: Worker
) -> None:
    """Grows Adam's moments as `weights/moments.py` says; the step count of each parameter is that of its first source.

    Moments under a wrong step count would be over- or undercorrected in the first updates.
    """
    ensure_state(optimizer)
    state = state_tensors(model, optimizer)
    steps = CheckpointTensors(checkpoint, "step.")
    known: Rules = {}
    for moment in MOMENTS:
        table = moment_rules(rules, moment, policy)
        # parameters that were frozen in the phase before have no state to go on from
        known = {
            name: table[name]
            for name in state["step"]
            if name in table and all(source in steps for source in table[name].sources)
        }
        for name, full in apply_rules(known, _AsTrained(CheckpointTensors(checkpoint, f"{moment}."), worker.device)):
            fill(state[moment][name], full)
    for name, rule in known.items():
        fill(state["step"][name], steps[rule.sources[0]])
    fresh = len(state["step"]) - len(known)
    if fresh and worker.rank == 0:
        logger.info("Adam starts afresh for %d of %d parameters: nothing is known of theirs", fresh, len(state["step"]))


def _tensor_checks(
    growth: Growth, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor], worker: Worker
) -> list[Check]:
    """Whether the tensors are what the growth's rules say, and their values, over all workers' shards."""
    names, statistics = tensor_statistics((name, local_part(tensor)) for name, tensor in parameters.items())
    total = torch.tensor(worker.sum(*statistics.flatten())).reshape(statistics.shape)
    all_zeros = [name for name, non_zero in zip(names, total[:, 2].tolist(), strict=True) if not non_zero]
    zeros = meant_zeros(growth.rules) | inherited_zeros(all_zeros, growth.rules, weights)
    return [
        _agreed(_rules_check(growth.rules, weights, parameters), worker),
        *statistics_checks(names, total, growth.config, zeros=zeros),
    ]


@torch.no_grad()
def _rules_check(rules: Rules, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Check:
    wrong = [
        name
        for name, full in apply_rules(rules, weights)
        if not torch.equal(part_of(full, like=parameters[name]), local_part(parameters[name]))
    ]
    return none_of("rules", wrong, "every tensor is bit-equal to what its rule makes of the source")


def _agreed(check: Check, worker: Worker) -> Check:
    """The check as all workers see it: passed where every one of them passed it."""
    failures = int(worker.sum(not check.passed)[0])
    if not failures or not check.passed:
        return check
    return replace(check, passed=False, detail=f"{failures} other workers found their shards to differ")


class _AsTrained(Sliceable):
    """Stored tensors where and as they are trained: growth runs on the worker's device, in fp32.

    With fewer bits it would round what is to cancel out; on one core a model of a billion parameters takes minutes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device, torch.float32)

    def take(self, name: str, index: int) -> Tensor:
        return take(self._tensors, name, index).to(self._device, torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
