"""One worker's place in the group: rank, device, mesh, and the few collectives that training needs."""

import resource
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from raygrow.nn.cost import peak_flops
from raygrow.train.parallel import make_mesh


@dataclass(frozen=True)
class Worker:
    """A member of the training group. The process group must be up."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh

    @classmethod
    def join(cls, device: torch.device) -> "Worker":
        """This process's place in the running process group."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return cls(dist.get_rank(), dist.get_world_size(), device, make_mesh(device))

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Sums of values over all workers; a tensor's elements follow one another."""
        row = torch.cat([torch.as_tensor(value, dtype=torch.float64, device=self.device).flatten() for value in values])
        dist.all_reduce(row)
        return row.tolist()

    def peak_flops(self) -> float | None:
        """Datasheet bf16 peak of all workers' devices together, where known."""
        if self.device.type != "cuda":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return peak and peak * self.count

    def peak_memory(self) -> int:
        """Most bytes this worker has held: on the GPU, or in RAM without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def set_determinism(*, deterministic: bool) -> None:
    """Makes CUDA results repeatable to the bit. The CUBLAS_WORKSPACE_CONFIG that this needs is set by the launcher."""
    torch.use_deterministic_algorithms(deterministic)
