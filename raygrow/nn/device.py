"""Where a model is computed."""

import torch


def choose_device(device: str | None = None) -> torch.device:
    """The device asked for; else CUDA where there is one, else the CPU.

    Raises:
        ValueError: If there is no such device, or nothing can be computed on it; names those that there are.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type != "meta":
            torch.zeros(1, device=chosen).item()
            return chosen
    except (RuntimeError, AssertionError):  # torch raises the latter where it was built without that kind
        pass
    there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
    raise ValueError(f"device={device}: nothing can be computed there, only on {there}; name one, or leave device out")
