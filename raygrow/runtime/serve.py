"""Models behind an OpenAI-compatible API on Ray Serve: an ingress that speaks HTTP, and an engine deployment per model.

`build` is what YAML files for `serve run` and `serve deploy` name; `serve_models` what `raygrow serve` calls.
"""

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raygrow.infer.config import longest_sequence
from raygrow.infer.load import sparsity_plan
from raygrow.infer.request import Delta, PromptTooLong, Request
from raygrow.runtime.cluster import connect, has_gpu
from raygrow.runtime.openai.app import make_app
from raygrow.runtime.openai.model import Overloaded
from raygrow.runtime.serve_config import LLMConfig, ServeConfig, read_config
from raygrow.runtime.serve_replica import Replica, engine_load
from raygrow.text.chat_template import ChatTemplate
from raygrow.text.tokenizer import load_tokenizer
from raygrow.weights.folder import open_folder

logger = logging.getLogger(__name__)

APP = "raygrow"
API_KEY = "RAYGROW_API_KEY"
"""Names the environment variable that holds the key, so that no file need."""
MOST_PORTS = 65535
SECONDS_OF_SILENCE = 20.0
"""While an app starts."""
POLL_SECONDS = 0.2


class Served:
    """A model whose engines are replicas of a deployment; what the API asks (see `openai.model.Model`).

    Args:
        llm: The model.
        handle: Of its deployment. Nothing is asked of it before the first request, so that no replica need be there.
    """

    def __init__(self, llm: LLMConfig, handle: DeploymentHandle) -> None:
        folder = open_folder(llm.model_loading_config.folder)
        self.id = llm.model_id
        self.tokenizer = load_tokenizer(folder.path)
        self.max_model_len = longest_sequence(llm.engine_kwargs, folder.config)
        self.sparsity = llm.engine_kwargs.sparsity or None
        self.created = int(time.time())
        self.folder = folder.path
        self._llm = llm
        self._handle = handle.options(stream=True)
        # straight to the replica: through Ray's store of objects every piece costs both sides twice as much
        self._straight = handle.options(stream=True, _by_reference=False)

    async def generate(self, request: Request) -> AsyncIterator[Delta]:
        """An answer in pieces. If its replica is lost, it ends with an error, or begins again if nothing has come yet.

        Raises:
            Overloaded: If there is no room for another request, before the first piece.
        """
        # scores of a long prompt are too much for one message: where others have started Ray, it has at most 4 MiB
        handle = self._straight if request.sampling.prompt_logprobs is None else self._handle
        begun = ended = False
        for last in (False, True):
            response: Any = handle.generate.remote(request)
            try:
                async for delta in response:
                    begun, ended = True, delta.finish_reason is not None
                    yield delta
                return
            except BackPressureError as error:
                raise Overloaded(retry_after=self._llm.deployment_config.retry_after_s) from error
            except DeploymentUnavailableError:
                reason = f"{self.id}: no replica of it runs, and none could be started"
                yield Delta(id=request.id, finish_reason="error", error=reason)
                return
            except RayTaskError as error:  # straight from a replica an error comes as it is
                if isinstance(error.cause, ValueError):  # the engine's own words, without the way they came
                    wrong = PromptTooLong if isinstance(error.cause, PromptTooLong) else ValueError
                    raise wrong(str(error.cause)) from error
                raise
            except RayActorError:
                logger.warning("a replica of %s was lost while it answered", self.id)
                if begun or last:
                    reason = f"{self.id}: the replica that wrote this answer was lost; ask again"
                    yield Delta(id=request.id, finish_reason="error", error=reason)
                    return
            except (GeneratorExit, asyncio.CancelledError):
                if not ended:
                    response.cancel()  # nobody reads on: the slot is free
                raise

    async def check(self) -> None:
        """Fails when the deployment cannot serve. It can with no replica: one starts when it is needed."""
        status = await asyncio.to_thread(serve.status)
        for app in status.applications.values():
            deployment = app.deployments.get(self._llm.deployment_name)
            if deployment and deployment.status == "DEPLOY_FAILED":
                raise RuntimeError(f"{self.id}: no replica could be started ({deployment.message})")


@serve.ingress()
class Ingress:
    """What speaks HTTP: the API of all models.

    Args:
        config: Of the whole app.
        handles: Of each model's deployment, by its id.
    """

    def __init__(self, config: ServeConfig, handles: dict[str, DeploymentHandle]) -> None:
        self._config = config
        self._models = {llm.model_id: Served(llm, handles[llm.model_id]) for llm in config.llm_configs}

    def __serve_build_asgi_app__(self) -> Any:
        api = self._config.api
        return make_app(self._models, replace(api, api_key=api.api_key or os.environ.get(API_KEY)))


def build(args: Mapping[str, Any]) -> serve.Application:
    """The app that `args` describe: `llm_configs`, and beside them `api` and `ingress`. See `serve_config`.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not allowed; names the key and the value.
        FileNotFoundError: If a model is not there.
    """
    return application(read_config(args))


def application(config: ServeConfig) -> serve.Application:
    """The app of a configuration. Models are opened first, so that what is missing is told before anything starts."""
    for llm in config.llm_configs:
        _check_model(llm)
    handles = {llm.model_id: _engines(llm) for llm in config.llm_configs}
    longest = max(llm.deployment_config.graceful_shutdown_timeout_s for llm in config.llm_configs)
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingress.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_ongoing_requests,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        graceful_shutdown_timeout_s=longest,
    )
    return ingress.bind(config, handles)


def _engines(llm: LLMConfig) -> serve.Application:
    """The deployment of one model."""
    deployment, scaling = llm.deployment_config, llm.deployment_config.autoscaling_config
    options = deployment.ray_actor_options or ({"num_gpus": 1} if has_gpu() else {"num_cpus": 1})
    bounds = ("min_replicas", "max_replicas", "initial_replicas", "upscale_delay_s", "downscale_delay_s")
    more = ("downscale_to_zero_delay_s", "look_back_period_s")
    return serve.deployment(
        Replica,
        name=llm.deployment_name,
        max_ongoing_requests=llm.max_ongoing_requests,
        max_queued_requests=llm.max_queued_requests,
        ray_actor_options=options,
        graceful_shutdown_timeout_s=deployment.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=deployment.health_check_period_s,
        health_check_timeout_s=deployment.health_check_timeout_s,
        max_constructor_retry_count=3,
        autoscaling_config={
            **{name: getattr(scaling, name) for name in (*bounds, *more)},
            "target_ongoing_requests": llm.target_ongoing_requests,
            "policy": AutoscalingPolicy(policy_function=engine_load),
        },
    ).bind(str(llm.model_loading_config.folder), llm.engine_kwargs)


def serve_models(
    config: ServeConfig,
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    ready: Callable[[str], bool] = lambda address: True,
) -> int:
    """Serves until told to stop (Ctrl-C, SIGTERM); then streams finish, and the app goes. Told again, it goes at once.

    Args:
        config: Of the app.
        host: Where to listen.
        port: The port there.
        api_key: What clients have to show, unless the configuration says.
        ready: Called with the address when all is there; whether to go on serving.

    Raises:
        OSError: If the port is taken.
        KeyboardInterrupt: If told to stop before all is there, or told again.
        ValueError: If Ray Serve already listens elsewhere, or cannot start the app.
    """
    for llm in config.llm_configs:
        _check_model(llm)
    connect()
    others = bool(serve.status().proxies)
    if not others:
        check_port(host, port)
    elif not _listens(host, port):
        raise ValueError(
            f"Ray Serve runs on this cluster already, and listens elsewhere than at {host}:{port}; give its --host and "
            "--port, or end it with `serve shutdown`"
        )
    app = application(replace(config, api=replace(config.api, api_key=config.api.api_key or api_key)))
    started, stop = threading.Event(), threading.Event()

    def told(*_: object) -> None:
        at_once = stop.is_set() or not started.is_set()  # all that waits may wait for ever
        stop.set()
        if at_once:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, told)
    serve.start(http_options={"host": host, "port": port})
    with _nothing_stays(others=others):
        threading.Thread(target=_tell_what_is_missing, args=(started,), daemon=True).start()
        try:
            serve.run(app, name=APP, route_prefix="/")
        except RuntimeError as error:
            raise ValueError(f"the app did not start: {error}") from error
        finally:
            started.set()
        names, address = ", ".join(llm.model_id for llm in config.llm_configs), _address(host, port)
        logger.info("%s at %s (a page to chat) and %s/v1", names, address, address)
        if not ready(address):
            stop.set()
        stop.wait()
        logger.info("stopping: answers that are being written are finished first; Ctrl-C again stops at once")
    return 0


@contextmanager
def _nothing_stays(*, others: bool) -> Iterator[None]:
    """Ends the app with the body, however that ends, and then Serve, unless `others` have started it.

    Who interrupts does not wait for that: Serve gives up replicas for which there is no room only after minutes.
    """
    interrupted = False
    try:
        yield
        _end_app()
        while APP in serve.status().applications:
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        _end_app()
        interrupted = isinstance(error, KeyboardInterrupt)
        raise
    finally:
        if not others and not interrupted:
            serve.shutdown()


def _end_app() -> None:
    """Tells the app to end, and does not wait: Serve would for a minute, and last answers may take longer."""
    serve.delete(APP, _blocking=False)
    serve.status()  # is answered when that has arrived


def _tell_what_is_missing(started: threading.Event) -> None:
    """Says from time to time what the app still waits for."""
    while not started.wait(SECONDS_OF_SILENCE):
        for app in serve.status().applications.values():
            for name, deployment in app.deployments.items():
                if deployment.status != "HEALTHY":
                    logger.info("%s is not ready yet. %s", name, deployment.message)


def _address(host: str, port: int) -> str:
    """Where people find what listens there."""
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _check_model(llm: LLMConfig) -> None:
    """Raises unless a model is there and whole, and takes the length and the sparsity that it is to have."""
    folder = open_folder(llm.model_loading_config.folder)
    ChatTemplate(load_tokenizer(folder.path))
    try:
        longest_sequence(llm.engine_kwargs, folder.config)
        sparsity_plan(folder, llm.engine_kwargs)
    except ValueError as error:
        raise ValueError(f"{llm.model_id}: {error}") from error


def _listens(host: str, port: int) -> bool:
    """Whether somebody does there."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def check_port(host: str, port: int) -> None:
    """Raises OSError if somebody listens there already, which Serve would only log; ValueError if it is no port."""
    if not 1 <= port <= MOST_PORTS:
        raise ValueError(f"--port {port}: must be 1 to {MOST_PORTS}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} of {host} is taken; choose another with --port") from None
            raise OSError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another --host or --port"
            ) from None
