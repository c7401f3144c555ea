"""Models from outside or from nothing: a pre-trained Hugging Face causal LM, or a fresh one from a config mapping.

Owns the checks that must hold before a step is spent: every weight of the model comes from the files, all of them
finite, the vocabulary covers the stores, the rows fit the positions. Refuses pickled weights (safetensors only),
unknown keys in a fresh config, and code from a hub model unless ``model.trust_remote_code`` is set. Dropout is off
unless a fresh config asks for it: pre-training data is not repeated.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from cpt.config import ConfigError, ModelSection, Problem
from cpt.model import kernels

# transformers spells dropout differently in each family.
DROPOUT_FIELD = re.compile(r"^(?!.*(classifier|summary)).*(dropout|_pdrop)(_prob)?$")
# Accepted in a fresh mapping although the config class of some transformers version does not list them.
FREE_KEYS = frozenset({"model_type", "architectures", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "head_dim"})
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class BuildReport:
    """What a model is made of. Counts are parameters, tied weights counted once; names are the model's own."""

    origin: str
    family: str
    attention: str
    parameters: int
    loaded_parameters: int
    unexpected: tuple[str, ...] = ()  # in the files, not in the model
    newly_initialised: tuple[str, ...] = ()
    dropout_switched_off: tuple[str, ...] = ()
    vocabulary: str = ""  # rows and tokens, in words

    @property
    def loaded_fraction(self) -> float:
        return self.loaded_parameters / self.parameters

    def render(self) -> str:
        source = f"{self.loaded_fraction:.0%} loaded" if self.loaded_parameters else "newly initialised"
        line = f"{self.family} from {self.origin}: {self.parameters:,} parameters, {source}, attention {self.attention}"
        if self.unexpected:
            line += f"; not used from the files: {_some(self.unexpected)}"
        if self.dropout_switched_off:
            line += f"; dropout switched off: {_some(self.dropout_switched_off)}"
        return f"{line}\n{self.vocabulary}" if self.vocabulary else line


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal LM, ready for ``kernels.forward_logits`` with ``report.attention``."""

    model: torch.nn.Module
    report: BuildReport


@dataclass(frozen=True)
class Needs:
    """What the run asks of a model: its row length, the largest vocabulary among its stores, the seed of fresh weights.

    ``compute_dtype`` is what attention will see where an engine casts the weights itself; None: the weights' dtype.
    """

    seq_len: int
    vocab_size: int
    seed: int
    compute_dtype: torch.dtype | None = None


def build_model(
    section: ModelSection, needs: Needs, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """The model that ``section`` describes, in ``dtype`` on ``device``, with the attention back-end set.

    ``dtype`` holds the weights; an engine that keeps fp32 masters should get fp32 here and cast for itself.

    Raises:
        ConfigError: anything the user can fix, see the module docstring.
    """
    device = torch.device(device)
    backend = kernels.resolve_backend(section.attention, device=device, dtype=needs.compute_dtype or dtype)
    config = read_model_config(section, vocab_size=needs.vocab_size)
    check_fit(config, needs)
    fresh = section.fresh is not None
    unexpected: tuple[str, ...] = ()
    switched_off = _switch_off_dropout(config, keep=_fresh_mapping(section.fresh) if section.fresh is not None else {})
    if fresh:
        model = _initialise(config, seed=needs.seed, dtype=dtype)
    else:
        model, unexpected = _load(section, config, dtype)
    kernels.prepare_model(model, backend)
    _refuse_hidden_state(model)
    names = tuple(name for name, _ in model.named_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    report = BuildReport(
        origin="a fresh configuration" if fresh else str(section.init_from),
        family=config.model_type,
        attention=backend,
        parameters=total,
        loaded_parameters=0 if fresh else total,
        unexpected=unexpected,
        newly_initialised=names if fresh else (),
        dropout_switched_off=switched_off,
    )
    return LoadedModel(model.to(device), report)


def build_from_config(
    saved: Mapping[str, Any], section: ModelSection, needs: Needs, *, device: torch.device | str = "cpu"
) -> LoadedModel:
    """A model with the whole config of an earlier one (a checkpoint's), in fp32, its weights still to be filled in.

    Unlike a fresh mapping, which a person typed, its keys are not checked for typing errors: a config.json may hold
    any.
    """
    from transformers import AutoConfig

    device = torch.device(device)
    backend = kernels.resolve_backend(section.attention, device=device, dtype=needs.compute_dtype or torch.float32)
    config = AutoConfig.for_model(**saved)
    check_fit(config, needs)
    model = _initialise(config, seed=needs.seed, dtype=torch.float32)
    kernels.prepare_model(model, backend)
    total = sum(parameter.numel() for parameter in model.parameters())
    report = BuildReport("a checkpoint", config.model_type, backend, parameters=total, loaded_parameters=total)
    return LoadedModel(model.to(device), report)


def _refuse_hidden_state(model: torch.nn.Module) -> None:
    """Checkpoints hold parameters; a family with trained state outside them would lose it at every resume."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    hidden = sorted(set(model.state_dict()) - parameters)
    if hidden:
        rule = f"keeps state in buffers ({_some(hidden)}), which checkpoints do not hold"
        raise ConfigError(Problem("model", type(model).__name__, rule, "use another model family"))


# --- configuration ----------------------------------------------------------------------------------------------------


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
    mapping = _fresh_mapping(section.fresh)
    if "vocab_size" not in mapping and vocab_size is not None:
        mapping["vocab_size"] = vocab_size
    return _fresh_config(mapping)


def _fresh_mapping(fresh: Mapping[str, Any] | str) -> dict[str, Any]:
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
        raise ConfigError(Problem("model.init_from", origin, f"{rule} ({_first_line(error)})", fix)) from error


def _check_folder(folder: Path, origin: str) -> None:
    if not (folder / "config.json").is_file():
        fix = "give the folder that holds config.json, or a hub name"
        raise ConfigError(Problem("model.init_from", origin, "the folder has no config.json", fix))
    if any(folder.glob("*.safetensors")):
        return
    pickled = [path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        rule = f"has pickled weights only ({_some(pickled)}), which can run code when opened"
        raise ConfigError(Problem("model.init_from", origin, rule, "convert them to safetensors where you trust them"))
    raise ConfigError(Problem("model.init_from", origin, "the folder has no *.safetensors weights", "copy them there"))


def check_fit(config: Any, needs: Needs) -> None:
    """Raises ConfigError where rows are longer than the model's positions or the stores' vocabulary exceeds the
    model's.
    """
    text = config.get_text_config()
    problems = []
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and needs.seq_len > limit:
        rule = f"the model has {limit} positions (max_position_embeddings)"
        problems.append(Problem("data.seq_len", needs.seq_len, rule, f"set data.seq_len={limit} or less"))
    if needs.vocab_size > text.vocab_size:
        rule = f"the stores' tokenizer has more tokens than the model's table of {text.vocab_size}"
        fix = "tokenize with the model's own tokenizer, or name the extended one (cpt data extend-tokenizer) as "
        problems.append(Problem("data.stores", needs.vocab_size, rule, f"{fix}model.tokenizer"))
    if problems:
        raise ConfigError(*problems)


def _switch_off_dropout(config: Any, *, keep: Mapping[str, Any]) -> tuple[str, ...]:
    """Set every dropout field of ``config`` to 0 but those in ``keep``; returns the names changed."""
    fields = [
        name for name, value in config.to_dict().items() if DROPOUT_FIELD.match(name) and value and name not in keep
    ]
    for name in fields:
        setattr(config, name, 0.0)
    return tuple(fields)


# --- weights ----------------------------------------------------------------------------------------------------------


def _initialise(config: Any, *, seed: int, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        # In fp32 first: the same seed gives the same model, rounded, in every dtype.
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cast_parameters(model, dtype)
    return model


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of the parameters and leave buffers alone.

    ``model.to(torch.bfloat16)`` would also round the rotary frequencies: a relative error of 2^-9 is several radians at
    position 2048, and nothing reports it.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _load(section: ModelSection, config: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[str, ...]]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    origin = str(section.init_from)
    local = Path(origin).expanduser()
    if local.is_dir():
        _check_safetensors(local, origin)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(local) if local.is_dir() else origin,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=section.trust_remote_code,
            local_files_only=local.is_dir(),
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        rule = f"its weights cannot be loaded ({_first_line(error)})"
        raise ConfigError(
            Problem("model.init_from", origin, rule, "check that config.json belongs to the weights")
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        rule = f"its files lack {len(missing)} weights of the model: {_some(missing)}"
        raise ConfigError(
            Problem("model.init_from", origin, rule, "use a complete checkpoint; none is filled in at random")
        )
    broken = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        rule = f"weights hold NaN or infinity: {_some(broken)}"
        raise ConfigError(Problem("model.init_from", origin, rule, "use a checkpoint from before they broke"))
    return model, tuple(sorted(info["unexpected_keys"]))


def _check_safetensors(folder: Path, origin: str) -> None:
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            rule = f"{path.name} is damaged or cut short ({_first_line(error)})"
            raise ConfigError(Problem("model.init_from", origin, rule, "copy or download the file again")) from error


def load_tensors(model: torch.nn.Module, tensors: Iterable[tuple[str, Tensor]], *, origin: str) -> None:
    """Copy named tensors (a checkpoint's masters) into ``model``, in its dtype; every parameter must be covered.

    Raises:
        ConfigError: a missing or foreign name, or another shape, with the names.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    covered: set[int] = set()
    problems = []
    for name, tensor in tensors:
        if name not in own or own[name].shape != tensor.shape:
            wanted = f"the model has shape {tuple(own[name].shape)}" if name in own else "the model has no such weight"
            problems.append(
                Problem(f"{origin}: {name}", tuple(tensor.shape), wanted, "use the checkpoint's own config")
            )
            continue
        with torch.no_grad():
            own[name].copy_(tensor)
        covered.add(id(own[name]))
    missing = [name for name, parameter in own.items() if id(parameter) not in covered]
    if missing:
        problems.append(Problem(origin, _some(missing), "weights of the model are missing"))
    if problems:
        raise ConfigError(*problems[:10])


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, tied ones once: what ``load_tensors`` and ``export_checkpoint`` take."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
