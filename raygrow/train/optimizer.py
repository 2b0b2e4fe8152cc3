"""AdamW over a model's trainable parameters."""

import torch
from torch import Tensor, nn

from raygrow.train.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running averages, under the names torch gives them."""


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW. Matrices decay; norm weights and biases do not. Frozen parameters are left out."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if decays(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trainable if not decays(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def decays(name: str) -> bool:
    """Whether a parameter is a matrix. By name: the stacked biases of experts have two axes too."""
    *_, module, kind = name.split(".")
    return kind == "weight" and not module.endswith("norm")


def ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its moments and step count at zero, where it has none yet.

    Torch makes them at the first step; a checkpoint or a growth needs places to write to before that.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    **{name: torch.zeros_like(parameter) for name in MOMENTS},
                }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Adam's state by its name and the parameter's: `{"exp_avg": {"norm.weight": ...}, "step": ...}`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {key: {name: optimizer.state[p][key] for name, p in named} for key in (*MOMENTS, "step")}
