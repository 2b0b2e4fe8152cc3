"""What is served and how: models, their engines, replicas and limits. The names are those of ray.serve.llm.

`serve deploy` gives it as the `args` of a YAML file, `raygrow serve` from the command line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from raygrow.config import build
from raygrow.infer.config import EngineConfig
from raygrow.runtime.openai.app import ApiConfig

TARGET_SHARE = 0.75
"""Of an engine's slots that are taken when its replicas are as many as they should be."""
WAITING_PER_SLOT = 2
"""Requests that an engine holds back for each of its slots, before others wait outside."""
CALLS_BESIDE = 2048
"""Calls that an ingress process takes besides what its models hold, to turn them away in the API's own words: what it
does not take gets a line of plain text from Serve's HTTP proxy."""
MOST_REPLICAS = 64
OF_EVERY_MODEL = ("engine_kwargs", "deployment_config")
OF_THE_APP = ("api", "ingress")
ActorOption = Literal[
    "num_cpus",
    "num_gpus",
    "memory",
    "resources",
    "accelerator_type",
    "runtime_env",
    "label_selector",
    "fallback_strategy",
]
"""Those that Serve takes."""
TWICE = "two models are called that, or nearly that; give them other names, each as a folder or as a model_id"


@dataclass(frozen=True, kw_only=True)
class ModelLoadingConfig:
    """Which model, and what it is called."""

    model_id: str
    """What clients call it."""
    model_source: str
    """A model folder, raygrow's or Hugging Face's, or a finished run, on every machine that serves it."""

    def __post_init__(self) -> None:
        if not self.model_id.strip():
            raise ValueError(f"model_id={self.model_id!r}: must not be empty")

    @property
    def folder(self) -> Path:
        """The model folder.

        Raises:
            FileNotFoundError: If it is not there.
        """
        path = Path(self.model_source).expanduser()
        folder = path / "model" if (path / "run.yaml").exists() else path
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"model_source={self.model_source}: there is no model (no config.json in {folder}); "
                "give a model folder or a finished run, by its absolute path where a cluster serves it"
            )
        return folder.resolve()


@dataclass(frozen=True, kw_only=True)
class AutoscalingConfig:
    """How many replicas a model has, by the load of their engines."""

    min_replicas: NonNegativeInt = 1
    """0 lets the last one go; the next request waits until a replica has started."""
    max_replicas: PositiveInt = 1
    initial_replicas: NonNegativeInt | None = None
    target_ongoing_requests: PositiveFloat | None = None
    """Requests, running or waiting, that a replica should have; 3/4 of its `max_num_seqs` when not given. It is fewer
    while an engine lacks memory for more."""
    upscale_delay_s: NonNegativeFloat = 5.0
    downscale_delay_s: NonNegativeFloat = 120.0
    downscale_to_zero_delay_s: NonNegativeFloat | None = None
    """Before the last replica goes; as `downscale_delay_s` when not given."""
    look_back_period_s: PositiveFloat = 15.0
    """Load is its mean over this time."""

    def __post_init__(self) -> None:
        if not self.min_replicas <= self.max_replicas <= MOST_REPLICAS:
            raise ValueError(
                f"min_replicas={self.min_replicas}, max_replicas={self.max_replicas}: the second must be at least as "
                f"many as the first, and at most {MOST_REPLICAS}"
            )
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(f"initial_replicas={self.initial_replicas}: must be min_replicas to max_replicas")


@dataclass(frozen=True, kw_only=True)
class DeploymentConfig:
    """The replicas of one model. Each is a process with an engine of its own."""

    autoscaling_config: AutoscalingConfig = field(default_factory=AutoscalingConfig)
    max_ongoing_requests: PositiveInt | None = None
    """Requests that a replica takes at once, running or waiting; 3 for each slot (`max_num_seqs`) when not given."""
    max_queued_requests: PositiveInt | None = None
    """Requests that may wait outside when all replicas are full, or while none has started; as many as one replica
    takes when not given. Others are sent away with 429 and Retry-After."""
    retry_after_s: PositiveInt = 2
    """After how long those that are sent away should try again."""
    ray_actor_options: dict[ActorOption, Any] | None = None
    """What a replica needs, such as {num_gpus: 1}; a GPU where the cluster has any, else a CPU, when not given."""
    graceful_shutdown_timeout_s: NonNegativeFloat = 600.0
    """How long a replica that has to go may take for its last answers."""
    health_check_period_s: PositiveFloat = 5.0
    health_check_timeout_s: PositiveFloat = 30.0


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """One model that is served."""

    model_loading_config: ModelLoadingConfig
    engine_kwargs: EngineConfig = field(default_factory=EngineConfig)
    deployment_config: DeploymentConfig = field(default_factory=DeploymentConfig)

    @property
    def model_id(self) -> str:
        """What clients call it."""
        return self.model_loading_config.model_id

    @property
    def deployment_name(self) -> str:
        """What Ray calls its replicas."""
        return "engine-" + re.sub(r"[^\w.-]", "-", self.model_id, flags=re.ASCII)

    @property
    def max_ongoing_requests(self) -> int:
        """Requests that a replica takes at once."""
        given = self.deployment_config.max_ongoing_requests
        return given or (1 + WAITING_PER_SLOT) * self.engine_kwargs.max_num_seqs

    @property
    def max_queued_requests(self) -> int:
        """Requests that may wait outside."""
        return self.deployment_config.max_queued_requests or self.max_ongoing_requests

    @property
    def most_requests(self) -> int:
        """Requests that are anywhere at once, when there are as many replicas as there may be."""
        replicas = self.deployment_config.autoscaling_config.max_replicas
        return replicas * self.max_ongoing_requests + self.max_queued_requests

    @property
    def target_ongoing_requests(self) -> float:
        """Requests that a replica should have."""
        given = self.deployment_config.autoscaling_config.target_ongoing_requests
        return given or max(1.0, TARGET_SHARE * self.engine_kwargs.max_num_seqs)


@dataclass(frozen=True, kw_only=True)
class IngressConfig:
    """The processes that speak HTTP. They need no GPU and hold no model, only tokenizers."""

    num_replicas: PositiveInt = 1
    max_ongoing_requests: PositiveInt | None = None
    """Calls that each of them takes at once; when not given, what all models hold together, replicas and queues, and
    2048 more, which it turns away itself."""
    num_cpus: NonNegativeFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that decides an app."""

    llm_configs: tuple[LLMConfig, ...]
    api: ApiConfig = field(default_factory=ApiConfig)
    ingress: IngressConfig = field(default_factory=IngressConfig)

    def __post_init__(self) -> None:
        if not self.llm_configs:
            raise ValueError("llm_configs=[]: name at least one model")
        for name in ("model_id", "deployment_name"):
            names = [getattr(llm, name) for llm in self.llm_configs]
            for llm, repeated in zip(self.llm_configs, names, strict=True):
                if names.count(repeated) > 1:
                    raise ValueError(f"model_id={llm.model_id!r}: {TWICE}")

    @property
    def max_ongoing_requests(self) -> int:
        """Calls that an ingress process takes at once."""
        return self.ingress.max_ongoing_requests or sum(llm.most_requests for llm in self.llm_configs) + CALLS_BESIDE


def read_config(args: Mapping[str, Any]) -> ServeConfig:
    """The configuration of an app, from the `args` of a YAML file.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not allowed; names the key and the value.
    """
    models = args.get("llm_configs")
    if not isinstance(models, list):
        raise ValueError(f"llm_configs={models!r}: must be a list of models, each with a model_loading_config")
    # the list by itself, so that what is wrong in it has a name
    llm_configs = tuple(build(LLMConfig, tree, f"llm_configs[{i}]") for i, tree in enumerate(models))
    rest = build(_Rest, {key: value for key, value in args.items() if key != "llm_configs"})
    return ServeConfig(llm_configs=llm_configs, api=rest.api, ingress=rest.ingress)


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """What stands beside the models."""

    api: ApiConfig = field(default_factory=ApiConfig)
    ingress: IngressConfig = field(default_factory=IngressConfig)


def serve_args(
    models: Sequence[tuple[str, Path]], settings: Mapping[str, Any], *, name: str | None = None
) -> dict[str, Any]:
    """The `args` that words of a command line come to.

    Args:
        models: Names and folders.
        settings: Dotted keys and their values. `engine_kwargs` and `deployment_config` are those of every model.
        name: Of the only model, instead of its own.

    Raises:
        ValueError: If `name` is given for several models, a key goes through another that has a value, or none has it.
    """
    if name is not None and len(models) != 1:
        raise ValueError(f"--name {name}: names one model, and there are {len(models)}")
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key}: {part} has a value already")
        place[last] = value
    known = (*OF_EVERY_MODEL, *OF_THE_APP)
    if unknown := next((key for key in settings if key.split(".")[0] not in known), None):
        raise ValueError(f"{unknown}: there is no such setting; they begin with {', '.join(known)}")
    shared = {key: tree.pop(key) for key in OF_EVERY_MODEL if key in tree}
    return {
        "llm_configs": [
            {"model_loading_config": {"model_id": name or own, "model_source": str(folder)}, **shared}
            for own, folder in models
        ],
        **tree,
    }


def as_yaml(args: Mapping[str, Any], *, host: str, port: int) -> str:
    """The file that `serve deploy` takes for an app."""
    app = {"name": "raygrow", "route_prefix": "/", "import_path": "raygrow.runtime.serve:build", "args": dict(args)}
    tree = {"proxy_location": "EveryNode", "http_options": {"host": host, "port": port}, "applications": [app]}
    # several models may share one dict, which YAML would write as a reference
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False)


class _Plain(yaml.SafeDumper):
    """Without references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
