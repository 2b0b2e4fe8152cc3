"""config.json of a Hugging Face model, to and from ModelConfig."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raygrow.nn.config import ModelConfig
from raygrow.weights.hf.family import ACTIVATIONS, Family
from raygrow.weights.hf.llama import LLAMA
from raygrow.weights.hf.mixtral import MIXTRAL
from raygrow.weights.hf.qwen3 import QWEN3
from raygrow.weights.hf.qwen3_moe import QWEN3_MOE

FAMILIES = {family.model_type: family for family in (LLAMA, MIXTRAL, QWEN3, QWEN3_MOE)}

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAY_BE_NULL = ("n_kv_heads", "head_dim")  # ModelConfig works them out
_ADVICE = {
    "logit_scale": "a tied model that grows wider needs one; grown with untie=true, it gets a head of its own instead",
    "norm_topk_prob": "of the families that raygrow writes, only Qwen3Moe, which has QK-norm, can do without",
    "dense_blocks": "of the families that raygrow writes, only Qwen3Moe, which has QK-norm, can have dense blocks",
}


def family_of(config: ModelConfig) -> Family:
    """The family that can hold a model, if any can.

    Raises:
        ValueError: If none can; names the field.
    """
    dense, mixture = (QWEN3, QWEN3_MOE) if config.qk_norm else (LLAMA, MIXTRAL)
    family = mixture if config.n_experts else dense
    if config.rotation == "block":
        raise ValueError(
            f"rotation='block': a Hugging Face {family.title} has no place for adapters between its layers, so this "
            "model can only be written as a raygrow folder (rotation=global needs none)"
        )
    if config.mlp not in ACTIVATIONS:
        raise ValueError(
            f"mlp={config.mlp!r}: a Hugging Face {family.title} has mlp={' or '.join(map(repr, ACTIVATIONS))}, so this "
            "model can only be written as a raygrow folder"
        )
    for name, value in family.always.items():
        if getattr(config, name) != value:
            advice = f" ({_ADVICE[name]})" if name in _ADVICE else ""
            raise ValueError(
                f"{name}={getattr(config, name)!r}: a Hugging Face {family.title} always has {name}={value!r}, "
                f"so this model can only be written as a raygrow folder{advice}"
            )
    return family


def from_hf_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json`, of transformers 4 or 5.

    Raises:
        ValueError: If the model is of no family that raygrow knows, or has something that raygrow's models have not.
    """
    family = FAMILIES.get(str(settings.get("model_type")))
    if family is None:
        raise ValueError(
            f"model_type={settings.get('model_type')!r}: of Hugging Face's models raygrow reads {', '.join(FAMILIES)}"
        )
    spelled = {family.aliases.get(key, key): value for key, value in settings.items()}
    settings = {**family.defaults, **spelled}
    _refuse_what_raygrow_has_not(settings)
    for field, key in family.keys.items():
        if settings.get(key) is None and field not in _MAY_BE_NULL:
            raise ValueError(f"{key} is missing from the model's config.json")
    known = {field: settings[key] for field, key in family.keys.items() if settings.get(key) is not None}
    kinds: dict[str, Any] = {activation: kind for kind, activation in ACTIVATIONS.items()}
    kind = kinds[settings["hidden_act"]]
    rope_theta = _rope_theta(settings)
    try:
        config = ModelConfig(**dict(family.always), **known, mlp=kind, rope_theta=rope_theta)
    except ValueError as error:
        raise ValueError(f"{error}{_in_its_own_words(str(error), family)}") from error
    _check_window(settings, config.max_seq_len)
    return replace(config, **family.more_fields(settings, config.n_blocks))


def to_hf_config(config: ModelConfig, special_tokens: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 both read. The dtype of the stored tensors is left open.

    Args:
        config: The model.
        special_tokens: Of its keys, the ids of special tokens, where known.

    Raises:
        ValueError: If no family can hold the model; names the field.
    """
    family = family_of(config)
    if family is LLAMA and config.d_model % config.n_heads:  # no matter for the model, but transformers 5 checks it
        raise ValueError(
            f"d_model={config.d_model} is not a multiple of n_heads={config.n_heads}: transformers opens no such "
            "Llama, so this model can only be written as a raygrow folder"
        )
    config = config.regrouped(1)
    # left out, transformers would take ids that mean something else in this vocabulary
    ids = dict.fromkeys(("bos_token_id", "eos_token_id")) | {
        key: value for key, value in (special_tokens or {}).items() if key in _SPECIAL_TOKENS
    }
    return {
        "architectures": [f"{family.title}ForCausalLM"],
        "model_type": family.model_type,
        **{key: getattr(config, field) for field, key in family.keys.items()},
        "hidden_act": ACTIVATIONS[config.mlp],
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **family.more_keys(config),
        **ids,
        "dtype": None,
        "torch_dtype": None,
    }


def updated_hf_config(settings: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model made from another.

    In the same family: what the new shape changes, and every other key as it was. In another family: a new one, with
    the ids of the special tokens.
    """
    after = to_hf_config(config, settings)
    if after["model_type"] != settings["model_type"]:
        return after
    before = to_hf_config(from_hf_config(settings), settings)
    changed = {key: value for key, value in after.items() if value != before[key]}
    updated = {**settings, **changed}
    # one that says the same in several keys may now contradict itself; of a basis no config.json says anything
    meant = replace(config.regrouped(1), rotation="none")
    return updated if from_hf_config(updated) == meant else {**settings, **after}


def _in_its_own_words(message: str, family: Family) -> str:
    """Which keys of the family's config.json a message about fields is about."""
    keys = [f"{field} is {key}" for field, key in family.keys.items() if field != key and f"{field}=" in message]
    return f" (here {', '.join(keys)})" if keys else ""


def _refuse_what_raygrow_has_not(settings: Mapping[str, Any]) -> None:
    if settings["hidden_act"] not in ACTIVATIONS.values():
        known = " and ".join(ACTIVATIONS.values())
        raise ValueError(f"hidden_act={settings['hidden_act']!r}: only {known} are supported")
    if settings.get("quantization_config"):
        raise ValueError("quantization_config: quantized checkpoints cannot be read, use the original weights")


def _check_window(settings: Mapping[str, Any], max_seq_len: int) -> None:
    window = settings.get("sliding_window") if settings["use_sliding_window"] else None
    if window is not None and not (type(window) is int and window >= max_seq_len):
        raise ValueError(
            f"sliding_window={window!r} is less than max_position_embeddings={max_seq_len}: raygrow's attention sees "
            "every token before. Texts up to the window are scored the same: to go on without it, set sliding_window "
            f"to null and max_position_embeddings to {window}"
        )


def _rope_theta(settings: Mapping[str, Any]) -> float:
    # transformers 5 holds theta and scaling in `rope_parameters`, 4 holds theta beside `rope_scaling`; where both are,
    # transformers goes by the older one
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling or rope_parameters={rope!r}: must hold keys and values")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope scaling {kind!r}: only unscaled rotary positions (default) are supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']}: only whole heads can be rotated")
    theta = rope.get("rope_theta", settings["rope_theta"])
    if type(theta) not in (int, float):
        raise ValueError(f"rope_theta={theta!r}: must be a number")
    return float(theta)
