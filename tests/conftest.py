"""What every test has: one thread, a home of its own, no network, no process group left behind; and the one Ray."""

import os
import sys
from collections.abc import Iterator

import pytest

# before torch is imported, also for processes that tests start
os.environ.update(
    OMP_NUM_THREADS="1",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # torch looks once, at the first product on a GPU
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # a process more for each phase
)


@pytest.fixture(scope="session", autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """The Ray of the whole test run, with four CPUs whatever the machine has. Tests neither start nor stop it."""
    import ray

    from raygrow.runtime.cluster import SERVE_SETTINGS

    os.environ.update(SERVE_SETTINGS)
    # Ray Train needs the dashboard to clean up after a run that was cut short
    ray.init(num_cpus=4, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()
