"""Everything that turns single-device model code into a sharded, compiled training model, applied from outside.

Order: activation checkpointing, then compile, then FSDP2, all per Block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from raygrow.nn.config import ModelConfig
from raygrow.nn.init import initial_value
from raygrow.nn.rack import Rack
from raygrow.train.config import TrainConfig
from raygrow.train.plan import is_frozen
from raygrow.weights.shapes import meta_rack


def make_mesh(device: torch.device) -> DeviceMesh:
    """One axis, `data`, over all workers."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether forward and backward run in bf16."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether Blocks are compiled."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def build_sharded(model: ModelConfig, config: TrainConfig, mesh: DeviceMesh, device: torch.device) -> Rack:
    """A Rack whose every Block is sharded over the mesh, with memory but no values yet.

    It is made on the meta device, so that no worker ever holds the whole model.
    """
    rack = meta_rack(model)
    for block in rack.blocks:
        if config.activation_checkpointing:
            block.forward = _checkpointed(block.forward)
        if compiles(config, device):
            # the forward, not the module: FSDP's hooks then stay outside the compiled graph
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    bf16 = uses_bf16(config, device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    reshard_blocks = {"on": True, "off": False, "auto": mesh.size() > 1}[config.reshard_after_forward]
    for unit in rack.fsdp_units():
        # for the Rack's own, head and embedding, the backward pass follows at once
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_blocks and unit is not rack)
    return rack.to_empty(device=device)


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same forward pass, which keeps its inputs only and is run again in the backward pass."""

    def run(*arguments: Any) -> Tensor:
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run


def reshard(model: Rack) -> None:
    """Gives every unit its sharded parameters back after a forward pass that no backward pass follows."""
    for unit in model.fsdp_units():
        assert isinstance(unit, FSDPModule)
        unit.reshard()


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Freezes the parameters whose names match a shell pattern."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, patterns))


def fill(destination: Tensor, full: Tensor) -> None:
    """Copies a full tensor into a sharded (or plain) one; each worker keeps its own part. No communication."""
    with torch.no_grad():
        local_part(destination).copy_(part_of(full, like=destination))


def part_of(full: Tensor, *, like: Tensor) -> Tensor:
    """The part of a full tensor that this worker has of a sharded one, in its dtype; all of it for a plain one."""
    full = full.to(like.dtype)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def fill_initial(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter as `nn/init.py` says; the same values for any number of workers."""
    for name, parameter in model.named_parameters():
        fill(parameter, initial_value(name, parameter.shape, config, seed))


def fill_from(destinations: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Fills parameters from full tensors of the same names, one at a time.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    for name, destination in destinations.items():
        if name not in tensors:
            raise ValueError(f"the source has no tensor {name!r}")
        full = tensors[name]
        if full.shape != destination.shape:
            raise ValueError(f"{name}: the source has shape {tuple(full.shape)}, not {tuple(destination.shape)}")
        fill(destination, full)


def local_part(tensor: Tensor) -> Tensor:
    """A worker's own part of a sharded tensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
