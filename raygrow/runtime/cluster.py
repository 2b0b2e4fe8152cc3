"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os

import ray

SERVE_SETTINGS = {
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
}
"""Ray Serve's processes read these variables when they start: its HTTP proxy then hears from replicas straight instead
of through Ray's store of objects, which takes a third less CPU, and such messages may be larger than 4 MiB."""


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS (set inside a Ray job), else starts Ray here. Does nothing when connected.

    The dashboard stays on: without it Ray Train cannot clean up the placement groups of a run that was cut short.
    SERVE_SETTINGS hold where Ray is started, unless the environment has others.
    """
    if not ray.is_initialized():
        for name, value in SERVE_SETTINGS.items():
            os.environ.setdefault(name, value)
        ray.init(include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)


def has_gpu() -> bool:
    """Whether the cluster has any GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0
