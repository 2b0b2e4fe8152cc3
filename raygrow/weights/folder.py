"""Model folders: config.json, safetensors and a tokenizer, in raygrow's own format or a Hugging Face one."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.text.tokenizer import TOKENIZER_FILE, TOKENIZER_FILES, load_tokenizer
from raygrow.weights.apply import Derived, apply_rules
from raygrow.weights.atomic import new_folder
from raygrow.weights.hf.config import FAMILIES, from_hf_config, to_hf_config, updated_hf_config
from raygrow.weights.hf.fused import unfusing_rules
from raygrow.weights.hf.layout import EMBEDDING, HEAD, hf_layout, is_derived
from raygrow.weights.json_file import read_json
from raygrow.weights.layout import Layout, own_layout
from raygrow.weights.rules import Rules
from raygrow.weights.safetensors_io import MAX_SHARD_BYTES, SafetensorsFolder, write_safetensors
from raygrow.weights.shapes import meta_rack, parameter_shapes

Format = Literal["raygrow", "hf"]

COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
"""Files that go with a model wherever it goes; a folder has some of them."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""How transformers 5 and 4 call the dtype of the stored tensors."""


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on disk. Opening one reads headers only."""

    path: Path
    format: Format
    config: ModelConfig
    settings: dict[str, Any]
    """config.json as it is."""
    tensors: Mapping[str, Tensor]
    """Every parameter under raygrow's name, not to be written to: where it is stored as it is, a view of the file."""


def open_folder(path: str | Path) -> ModelFolder:
    """Opens a model folder of either format and checks that it holds the tensors its config calls for.

    Raises:
        FileNotFoundError: If the folder, its config.json or a file of tensors is missing.
        ValueError: If the config cannot be read or a tensor is missing, unexpected or of another shape; names it.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is not a model folder: it has no config.json")
    settings = read_json(path / "config.json")
    own = settings.get("model_type") == "raygrow"
    try:
        config = _own_config(settings) if own else from_hf_config(settings)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    layout = layout_of(config, "raygrow" if own else "hf")
    stored: Mapping[str, Tensor] = SafetensorsFolder(path)
    found = stored.shapes()
    if not own and (rules := unfusing_rules(found, FAMILIES[settings["model_type"]])):
        stored, found = Derived(rules, stored), _shapes(rules, found)
    _check_stored(stored, found, layout.shapes, path, config)
    return ModelFolder(
        path=path,
        format="raygrow" if own else "hf",
        config=config,
        settings=settings,
        tensors=Derived(layout.load, stored),
    )


def finished_model(path: str | Path) -> Path:
    """The model folder that is meant by a path: the folder itself, or the model of a finished run.

    Raises:
        FileNotFoundError: If it is a run that has no finished model.
    """
    path = Path(path)
    if not (path / "run.yaml").exists():
        return path
    if not (path / "model").exists():
        raise FileNotFoundError(f"{path}: this run has no finished model yet; start it again to go on")
    return path / "model"


def layout_of(config: ModelConfig, format: Format) -> Layout:
    """How a model lies in a folder of a format.

    Raises:
        ValueError: If the format cannot hold the model; names the field.
    """
    return hf_layout(config) if format == "hf" else own_layout(config)


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Rack:
    """The model of a folder, with tensors of its own.

    Args:
        path: A folder that `open_folder` takes.
        dtype: Of the parameters; as stored when not given.
        device: Where they go.
    """
    folder = open_folder(path)
    model = meta_rack(folder.config)
    tensors = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in folder.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def write_folder(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    format: Format = "raygrow",
    tokenizer_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    settings: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> Path:
    """Writes a model folder, one tensor at a time; it appears under its name when it is complete.

    Args:
        path: The new folder.
        config: The model.
        tensors: Every parameter under raygrow's name, in any order. A tied model has no head.
        format: `raygrow`, or `hf` for the Hugging Face family that can hold the model (see `weights/hf/`).
        tokenizer_from: A folder whose tokenizer files, and settings of generation, are copied along.
        dtype: Converts the parameters; each keeps its own when not given.
        settings: For `hf`, the config.json of the model that this one was made from: in the same family, keys of it
            that the new shape does not change are kept; in another, the ids of its special tokens are.
        max_shard_bytes: Size beyond which the tensors are spread over several files.
        replace: Take the place of a folder that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If a parameter is missing, unexpected or of another shape, or the format cannot hold the model.
        OSError: If the folder exists already or cannot be written.
    """
    description = describe(config, format, settings=settings, tokenizer_from=tokenizer_from)
    if dtype is not None and format == "hf":
        description |= dict.fromkeys(DTYPE_KEYS)
    layout, shapes = layout_of(config, format), parameter_shapes(config)
    stored_names = defaultdict(list)
    for stored, rule in layout.store.items():
        stored_names[rule.sources[0]].append(stored)
    return write_stored(
        path,
        (
            (stored, layout.store[stored].apply({name: tensor}))
            for name, tensor in _checked(tensors, shapes, dtype)
            for stored in stored_names[name]
        ),
        layout,
        description,
        companions_from=tokenizer_from,
        max_shard_bytes=max_shard_bytes,
        replace=replace,
    )


def write_stored(
    path: str | Path,
    stored: Iterable[tuple[str, Tensor]],
    layout: Layout,
    description: dict[str, Any],
    *,
    companions_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> Path:
    """What `write_folder` does, for tensors under the names that the format has for them.

    Args:
        path: The new folder.
        stored: Every tensor of the layout, in any order.
        layout: Of the model in its format, see `layout_of`.
        description: Of the model in its format, see `describe`.
        companions_from: A folder whose tokenizer files, and settings of generation, are copied along.
        max_shard_bytes: Size beyond which the tensors are spread over several files.
        replace: Take the place of a folder that is already there.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
        OSError: If the folder exists already or cannot be written.
    """
    path = Path(path)
    with new_folder(path, replace=replace) as aside:
        checked = _checked(stored, layout.shapes)
        dtypes = write_safetensors(aside, checked, names=layout.shapes, max_shard_bytes=max_shard_bytes)
        unknown = [key for key in DTYPE_KEYS if key in description and description[key] is None]
        if unknown:
            description = description | dict.fromkeys(unknown, str(dtypes[EMBEDDING]).removeprefix("torch."))
        (aside / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        if companions_from is not None:
            _copy_companions(Path(companions_from), aside)
    return path


def describe(
    config: ModelConfig,
    format: Format,
    *,
    settings: dict[str, Any] | None = None,
    tokenizer_from: str | Path | None = None,
) -> dict[str, Any]:
    """The config.json of a model in a format; the dtype of the tensors is left open (null).

    Args:
        config: The model.
        format: As in `write_folder`, and so are the others.
        settings: The config.json of the Hugging Face model that this one was made from.
        tokenizer_from: A folder whose tokenizer, if it has one, says which token ends a text.

    Raises:
        ValueError: If the format cannot hold the model; names the field.
    """
    if format == "raygrow":
        return {"model_type": "raygrow", "model": asdict(config)}
    if settings is not None:
        return updated_hf_config(settings, config)
    if tokenizer_from is None or not (Path(tokenizer_from) / TOKENIZER_FILE).exists():
        return to_hf_config(config)
    return to_hf_config(config, {"eos_token_id": load_tokenizer(tokenizer_from).eos_id})


def _copy_companions(source: Path, target: Path) -> None:
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _own_config(settings: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    model = settings.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"model={model!r}: the fields of the model have to be here")
    if unknown := sorted(set(model) - known):
        raise ValueError(f"model.{unknown[0]} is not a field of a model: written by another version of raygrow?")
    try:
        return ModelConfig(**model)
    except TypeError as error:  # a required field is not there
        raise ValueError(str(error)) from error


def _shapes(rules: Rules, sources: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of the targets of rules, from those of the sources."""
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in sources.items()}
    return {name: tensor.shape for name, tensor in apply_rules(rules, on_meta)}


def _check_stored(
    stored: Mapping[str, Tensor],
    found: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    folder: Path,
    config: ModelConfig,
) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder}: tensor {name!r} is missing; its config.json calls for it")
        if found[name] != shape:
            raise ValueError(
                f"{folder}: tensor {name!r} has shape {tuple(found[name])}, its config.json calls for {tuple(shape)}"
            )
    for name in found:
        if name not in expected and not is_derived(name, config):
            raise ValueError(f"{folder}: tensor {name!r} has no place in the model that its config.json describes")
    tied_twice = config.tie_embeddings and HEAD in found and EMBEDDING in found
    if tied_twice and not torch.equal(stored[HEAD], stored[EMBEDDING]):
        raise ValueError(
            f"{folder}: its config.json says tie_word_embeddings=true, but {HEAD} is stored and is not the embedding: "
            "set tie_word_embeddings to false there, or remove that tensor"
        )


def _checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Passes the tensors on, converted, and raises unless they are exactly those of the model."""
    missing = dict(shapes)
    for name, tensor in tensors:
        expected = missing.pop(name, None)
        if expected is None:
            raise ValueError(f"tensor {name!r} has no place in the model, or came twice")
        if tensor.shape != expected:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the model has {tuple(expected)}")
        yield name, tensor.to(dtype=dtype)
    if missing:
        raise ValueError(f"tensor {next(iter(missing))!r} of the model was not given")
