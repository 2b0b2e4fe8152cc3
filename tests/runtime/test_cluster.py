"""Where raygrow starts Ray, Serve's processes find its settings; what somebody has set stays."""

import os

import pytest
import ray

from raygrow.runtime.cluster import SERVE_SETTINGS, connect


@pytest.mark.parametrize("running", [False, True])
def test_settings_hold_where_ray_is_started(monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    (first, value), (second, _) = SERVE_SETTINGS.items()
    monkeypatch.setenv(first, "")  # so that it is restored
    monkeypatch.delenv(first)
    monkeypatch.setenv(second, "own")
    started = []
    monkeypatch.setattr(ray, "is_initialized", lambda: running)
    monkeypatch.setattr(ray, "init", lambda **options: started.append((os.environ.get(first), options)))
    connect()
    assert [found for found, _ in started] == ([] if running else [value])
    assert os.environ[second] == "own"
