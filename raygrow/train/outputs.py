"""What a sharded model says on fixed tokens, for the verifier. Every worker sees all of it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from raygrow.nn.moe import Moe
from raygrow.nn.rack import Rack
from raygrow.train.config import TrainConfig
from raygrow.train.evaluation import Validation
from raygrow.train.parallel import compiles, reshard
from raygrow.train.worker import Worker
from raygrow.weights.verify import Outputs

PROBE_SEQUENCES, PROBE_TOKENS = 2, 64
"""Size of the batch on which models are compared before and after growth."""


@torch.no_grad()
def outputs(model: Rack, validation: Validation, config: TrainConfig, worker: Worker) -> Outputs:
    """Logits, residual stream and router logits on the probe tokens, and the validation loss.

    Blocks run as they are written, compiled or not: compiled ones round differently, and hide what is inside them.
    """
    probe_BT = validation.probe(PROBE_SEQUENCES, PROBE_TOKENS).to(worker.device)
    residuals_BTD: dict[int, Tensor] = {}
    router_logits_BTE: dict[int, Tensor] = {}
    hooks = []
    for index, block in enumerate(model.blocks):
        hooks.append(block.register_forward_hook(_keep(residuals_BTD, index)))
        if isinstance(block.mlp, Moe):
            hooks.append(block.mlp.router.register_forward_hook(_keep(router_logits_BTE, index)))
    as_written = torch.compiler.set_stance("force_eager") if compiles(config, worker.device) else nullcontext()
    with as_written:
        logits_BTV = model(probe_BT).cpu()
        for hook in hooks:
            hook.remove()
        reshard(model)
        loss = validation.loss(model, worker)
    return Outputs(
        logits_BTV=logits_BTV,
        residuals_BTD=list(residuals_BTD.values()),
        router_logits_BTE=router_logits_BTE,
        loss=loss,
    )


def _keep(kept: dict[int, Tensor], index: int) -> Callable[..., None]:
    """A hook that keeps what a Block (first of what it returns) or a router gives."""

    def hook(module: Any, inputs: Any, output: Tensor | tuple[Tensor, Any]) -> None:
        kept[index] = (output[0] if isinstance(output, tuple) else output).cpu()

    return hook
