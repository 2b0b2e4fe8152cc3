"""Joining a Ray cluster, or starting one on this machine."""

import logging

import ray


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS (set inside a Ray job), else starts Ray here. Does nothing when connected.

    The dashboard stays on: without it Ray Train cannot clean up the placement groups of a run that was cut short.
    """
    if not ray.is_initialized():
        ray.init(include_dashboard=True, log_to_driver=False, logging_level=logging.WARNING)


def has_gpu() -> bool:
    """Whether the cluster has any GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0
