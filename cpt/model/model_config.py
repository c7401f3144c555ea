"""The transformers config of a model: of a Hugging Face folder or hub name, or of a mapping that a person wrote.

Owns what can be known of a model before its weights are touched. Refuses unknown families and keys, a folder without
config.json, and pickled weights, which can run code when opened.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cpt.config import ConfigError, ModelSection, Problem

# Accepted in a fresh mapping although the config class of some transformers version does not list them.
FREE_KEYS = frozenset({"model_type", "architectures", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "head_dim"})
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_model_config(section: ModelSection, *, vocab_size: int | None = None) -> Any:
    """The transformers config of the model, without touching weights (for sizes before a start).

    ``vocab_size`` fills in a fresh mapping that does not state its own.

    Raises:
        ConfigError: neither or both of init_from and fresh, missing folder or config.json, unknown family or key.
    """
    if (section.init_from is None) == (section.fresh is None):
        rule = "exactly one of model.init_from and model.fresh must be given"
        raise ConfigError(Problem("model.init_from", section.init_from, rule))
    if section.fresh is None:
        return _pretrained_config(str(section.init_from), trust_remote_code=section.trust_remote_code)
    mapping = fresh_mapping(section.fresh)
    if "vocab_size" not in mapping and vocab_size is not None:
        mapping["vocab_size"] = vocab_size
    return _fresh_config(mapping)


def fresh_mapping(fresh: Mapping[str, Any] | str) -> dict[str, Any]:
    if not isinstance(fresh, str):
        return dict(fresh)
    try:
        mapping = yaml.safe_load(Path(fresh).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(Problem("model.fresh", fresh, f"cannot be read: {error}", "give a YAML file")) from error
    if not isinstance(mapping, dict):
        raise ConfigError(Problem("model.fresh", fresh, "holds no mapping", "see configs/models/ for examples"))
    return mapping


def _fresh_config(mapping: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = mapping.get("model_type")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rule = "is no causal language model that transformers knows"
        raise ConfigError(
            Problem("model.fresh.model_type", family, rule, _nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        )
    known = set(AutoConfig.for_model(family).to_dict()) | FREE_KEYS
    unknown = [
        Problem(f"model.fresh.{key}", mapping[key], f"is no field of a {family} config", _nearest(key, known))
        for key in mapping
        if key not in known
    ]
    if unknown:
        raise ConfigError(*unknown)
    try:
        config = AutoConfig.for_model(family, **{key: value for key, value in mapping.items() if key != "model_type"})
    except Exception as error:  # transformers and huggingface_hub raise their own, version-dependent, validation errors
        raise ConfigError(Problem("model.fresh", mapping, f"is refused by transformers: {error}")) from error
    heads, kv_heads = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if heads and kv_heads and heads % kv_heads:
        rule = f"must divide num_attention_heads={heads}" + (
            "" if "num_key_value_heads" in mapping else "; it is the family's default"
        )
        raise ConfigError(
            Problem("model.fresh.num_key_value_heads", kv_heads, rule, f"set it, to {heads} for plain attention")
        )
    return config


def _nearest(key: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _pretrained_config(origin: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    local = Path(origin).expanduser()
    if local.is_dir():
        _check_folder(local, origin)
    elif local.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", origin):
        raise ConfigError(Problem("model.init_from", origin, "is no folder", "give a Hugging Face folder or hub name"))
    try:
        name = str(local) if local.is_dir() else origin
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=local.is_dir())
    except (OSError, ValueError, KeyError) as error:
        rule = (
            "its config.json cannot be used"
            if local.is_dir()
            else "is neither a folder here nor a hub model within reach"
        )
        fix = "set model.trust_remote_code=true if you trust the code" if "trust_remote_code" in str(error) else ""
        raise ConfigError(Problem("model.init_from", origin, f"{rule} ({first_line(error)})", fix)) from error


def _check_folder(folder: Path, origin: str) -> None:
    if not (folder / "config.json").is_file():
        fix = "give the folder that holds config.json, or a hub name"
        raise ConfigError(Problem("model.init_from", origin, "the folder has no config.json", fix))
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        rule = f"has pickled weights only ({some(pickled)}), which can run code when opened"
        raise ConfigError(Problem("model.init_from", origin, rule, "convert them to safetensors where you trust them"))
    raise ConfigError(Problem("model.init_from", origin, "the folder has no *.safetensors weights", "copy them there"))


def some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
