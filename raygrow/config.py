"""The whole configuration of a run, and the strict way from a plain tree (YAML, overrides) to dataclasses.

Each component's config sits beside the component; this file only puts them together. Nothing here knows how a tree was
composed: Hydra, a Tune trial and `run.yaml` all come through `build`.
"""

import dataclasses
import difflib
import functools
import platform
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, TypeAdapter, ValidationError

from raygrow.data.corpus import DataConfig
from raygrow.evaluate.record import commit, versions
from raygrow.nn.config import ModelConfig
from raygrow.train.config import PlanConfig, TrainConfig, Workers, check_workers


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The processes that train. Each has its shard of the model (FSDP) and its share of every batch."""

    num: Workers = 1
    cpus: PositiveFloat = 1
    """CPU cores of one worker."""
    use_gpu: Literal["auto"] | bool = "auto"
    """`auto` gives each worker a GPU where the cluster has any."""
    max_failures: NonNegativeInt = 3
    """How often a phase is restarted from its last checkpoint after a worker was lost."""

    def __post_init__(self) -> None:
        check_workers("num", self.num)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run.

    Raises:
        ValueError: If parts that are each fine contradict one another; names both keys.
    """

    name: str
    """The run's folder under `storage_path`. Starting a name again goes on where it stopped."""
    storage_path: str = "runs"
    """A folder, or an address such as s3://bucket/runs."""
    seed: int = 0
    model: ModelConfig
    """The final model; what a plan starts from is derived from it."""
    data: DataConfig
    plan: PlanConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    control: bool = False
    """Also train the final model from scratch on the same FLOPs, and compare."""
    dry_run: bool = False
    """Build and grow everything on the meta device, print what it would cost, train nothing."""

    def __post_init__(self) -> None:
        for problem in _contradictions(self):
            raise ValueError(problem)


def _contradictions(run: RunConfig) -> Iterable[str]:
    """What single components cannot see, one sentence each, most basic first."""
    model, train = run.model, run.train
    if not run.name or "/" in run.name or run.name.startswith("."):
        yield f"name={run.name!r}: must be the plain name of a folder, without a slash or a leading dot"
    if model.attention_mode != "causal":
        yield (
            f"model.attention_mode={model.attention_mode!r}: training predicts the next token, which such a model can "
            "see; set model.attention_mode=causal"
        )
    if train.seq_len > model.max_seq_len:
        yield (
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}: "
            "lower the first or raise the second"
        )
    for name, phase in run.plan.phases.items():
        batch_size = phase.batch_size or train.batch_size
        micro_batch_size = train.micro_batch_size if phase.micro_batch_size is None else phase.micro_batch_size
        if micro_batch_size > batch_size:
            yield (
                f"phase {name}: micro_batch_size={micro_batch_size} is larger than the whole batch, "
                f"batch_size={batch_size}; lower train.micro_batch_size or plan.phases.{name}.micro_batch_size"
            )


def build(hint: Any, tree: Any, path: str = "") -> Any:
    """Turn a tree of plain values into a dataclass, strictly.

    Numbers written as text are read (`1e-3`); a union of dataclasses is told apart by its tag (`operator:`, `kind:`).

    Args:
        hint: A dataclass, a union of dataclasses, or any other type that one of their fields is annotated with.
        tree: Nested mappings, lists and plain values, as YAML gives them.
        path: The dotted key under which `tree` stands, for messages.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not allowed; names the key and the value.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, tree, path)
    arguments = typing.get_args(hint)
    members = [member for member in arguments if dataclasses.is_dataclass(member)]
    if _is_union(hint) and members:
        if tree is None and type(None) in arguments:
            return None
        return build(_member(members, tree, path), tree, path)
    if typing.get_origin(hint) is dict and members:
        _require_mapping(tree, path)
        return {str(key): build(arguments[1], value, _join(path, key)) for key, value in tree.items()}
    try:
        # true is no number, though Python counts with it
        return _adapter(hint).validate_python(tree, strict=True if isinstance(tree, bool) else None)
    except ValidationError as error:
        reasons = dict.fromkeys(detail["msg"] for detail in error.errors())
        raise ValueError(f"{path}={tree!r}: {', or: '.join(reasons)}") from None


def _build_dataclass(cls: Any, tree: Any, path: str) -> Any:
    _require_mapping(tree, path)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in tree:
        if key not in fields:
            raise ValueError(_unknown_key(str(key), list(fields), path))
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in tree:
            raise ValueError(f"{_join(path, name)} is missing: it has no default, so give it a value")
    values = {key: build(hints[key], value, _join(path, key)) for key, value in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(_join(path, str(error))) from None


def _member(members: list[Any], tree: Any, path: str) -> Any:
    """The member of a union of dataclasses that the tree's tag names."""
    _require_mapping(tree, path)
    if len(members) == 1:
        return members[0]
    tag = next(name for name, hint in _hints(members[0]).items() if _is_constant(hint))
    by_value = {typing.get_args(_hints(member)[tag])[0]: member for member in members}
    if str(tree.get(tag)) not in by_value:
        raise ValueError(f"{_join(path, tag)}={tree.get(tag)!r}: must be one of {', '.join(map(str, by_value))}")
    return by_value[str(tree[tag])]


def _unknown_key(key: str, known: list[str], path: str) -> str:
    near = difflib.get_close_matches(key, known, cutoff=0.7)
    meant = f" Did you mean {' or '.join(_join(path, name) for name in near)}?" if near else ""
    return f"{_join(path, key)}: there is no such key.{meant} Known here: {', '.join(known)}"


def _require_mapping(tree: Any, path: str) -> None:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path or 'the configuration'}={tree!r}: must be a mapping of keys to values")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_constant(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal and len(typing.get_args(hint)) == 1


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))


def to_tree(config: Any) -> Any:
    """The plain tree that `build` turns into an equal config again."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_tree(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def as_yaml(config: Any) -> str:
    """A config with every key it has, as YAML."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def to_yaml(run: RunConfig) -> str:
    """The text of `run.yaml`: the resolved configuration, and the code and versions that it ran with."""
    made_with = {"commit": commit(), "python": platform.python_version(), **versions()}
    return as_yaml(run) + as_yaml({"made_with": made_with})


def from_yaml(text: str) -> RunConfig:
    """The run that a `run.yaml` describes.

    Raises:
        ValueError: If the text is not that of a `run.yaml`, or of one that this version no longer understands.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"run.yaml is not YAML: {' '.join(str(error).split())}") from None
    _require_mapping(tree, "run.yaml")
    return build(RunConfig, {key: value for key, value in tree.items() if key != "made_with"})
