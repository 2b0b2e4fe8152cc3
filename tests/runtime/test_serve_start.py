"""Before an app answers: settings that cannot be are told in time, and a start that fails leaves nothing behind."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from raygrow.data.corpus import FilesCorpus
from raygrow.runtime import serve as starting
from raygrow.runtime.serve_config import read_config, serve_args
from tests.runtime.serving import free_port, random_model


@pytest.fixture
def model(corpus: FilesCorpus, tmp_path: Path) -> Path:
    return random_model(tmp_path / "model", Path(corpus.path) / "tokenizer")


def described(model: Path, **more: Any) -> dict[str, Any]:
    """One of `llm_configs`."""
    return {"model_loading_config": {"model_id": "small", "model_source": str(model)}, **more}


def test_more_tokens_than_a_model_takes_are_told(model: Path) -> None:
    with pytest.raises(ValueError, match="small: max_model_len=1025: this model takes 1024 tokens at most"):
        starting.build({"llm_configs": [described(model, engine_kwargs={"max_model_len": 1025})]})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ingress.num_replicas", 0),
        ("ingress.max_ongoing_requests", 0),
        ("ingress.num_cpus", -1),
        ("deployment_config.max_ongoing_requests", 0),
        ("deployment_config.retry_after_s", 0),
        ("deployment_config.graceful_shutdown_timeout_s", -1),
        ("deployment_config.health_check_period_s", 0),
        ("deployment_config.ray_actor_options", {"gpus": 1}),
        ("deployment_config.autoscaling_config.max_replicas", 0),
        ("deployment_config.autoscaling_config.initial_replicas", 0),
        ("deployment_config.autoscaling_config.initial_replicas", 2),
        ("deployment_config.autoscaling_config.upscale_delay_s", -1),
        ("deployment_config.autoscaling_config.look_back_period_s", 0),
    ],
)
def test_settings_that_cannot_be_are_named(setting: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{setting}={value}: ")):
        read_config(serve_args([("small", tmp_path)], {setting: value}))


@pytest.mark.parametrize(("settings", "taken"), [({}, 4 * 768 + 768 + 2048), ({"max_ongoing_requests": 9}, 9)])
def test_an_ingress_takes_all_that_its_models_hold_and_what_it_turns_away(
    settings: dict[str, int], taken: int, model: Path
) -> None:
    deployment = {"autoscaling_config": {"max_replicas": 4}, "ray_actor_options": {"num_cpus": 1}}
    large = described(model, engine_kwargs={"max_num_seqs": 256}, deployment_config=deployment)
    app = starting.build({"llm_configs": [large], "ingress": settings})
    assert app._bound_deployment.max_ongoing_requests == app._bound_deployment.max_queued_requests == taken


class MadeUpServe:
    """What Ray Serve would be told, where no app can start."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.done = error, list[str]()
        self.proxies, self.applications = dict[str, Any](), dict[str, Any]()

    def start(self, **options: Any) -> None:
        self.done.append("start")

    def run(self, app: Any, *, name: str, route_prefix: str) -> None:
        self.applications[name] = app
        raise self.error

    def status(self) -> "MadeUpServe":
        return self

    def delete(self, name: str, **options: Any) -> None:
        self.done.append("delete")
        del self.applications[name]

    def shutdown(self) -> None:
        self.done.append("shutdown")


@pytest.mark.parametrize(
    ("error", "told", "done"),
    [
        (RuntimeError("no engine"), ValueError("the app did not start: no engine"), ["start", "delete", "shutdown"]),
        (KeyboardInterrupt(), KeyboardInterrupt(), ["start", "delete"]),  # who has no time does not wait for more
    ],
)
def test_a_start_that_fails_leaves_nothing(
    error: BaseException, told: BaseException, done: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = MadeUpServe(error)
    monkeypatch.setattr(starting, "serve", made_up)
    monkeypatch.setattr(starting, "connect", lambda: None)
    monkeypatch.setattr(starting, "application", lambda config: config)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(type(told), match=f"{told}$"):
        starting.serve_models(read_config({"llm_configs": [described(model)]}), host="127.0.0.1", port=free_port())
    assert made_up.done == done
    assert not made_up.applications
