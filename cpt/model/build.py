"""Models from outside or from nothing: a pre-trained Hugging Face causal LM, or a fresh one from a config mapping.

Owns the checks that must hold before a step is spent: every weight of the model comes from the files, all of them
finite, the vocabulary covers the stores, the rows fit the positions. Refuses pickled weights (safetensors only),
unknown keys in a fresh config, and code from a hub model unless ``model.trust_remote_code`` is set. Dropout is off
unless a fresh config asks for it: pre-training data is not repeated.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt.config import ConfigError, ModelSection, Problem
from cpt.model import kernels
from cpt.model.lean import apply_lean
from cpt.model.liger import apply_liger
from cpt.model.model_config import first_line, fresh_mapping, read_model_config, some
from cpt.model.rope import change_base, has_rotary_positions

# transformers spells dropout differently in each family.
DROPOUT_FIELD = re.compile(r"^(?!.*(classifier|summary)).*(dropout|_pdrop)(_prob)?$")


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
    notes: tuple[str, ...] = ()  # what was chosen for speed or changed on the way, a line each

    @property
    def loaded_fraction(self) -> float:
        return self.loaded_parameters / self.parameters

    def render(self) -> str:
        source = f"{self.loaded_fraction:.0%} loaded" if self.loaded_parameters else "newly initialised"
        line = f"{self.family} from {self.origin}: {self.parameters:,} parameters, {source}, attention {self.attention}"
        if self.unexpected:
            line += f"; not used from the files: {some(self.unexpected)}"
        if self.dropout_switched_off:
            line += f"; dropout switched off: {some(self.dropout_switched_off)}"
        return "\n".join([line, *([self.vocabulary] if self.vocabulary else []), *self.notes])


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal LM, ready for ``kernels.forward_logits`` with ``report.attention``."""

    model: torch.nn.Module
    report: BuildReport

    def noting(self, *notes: str) -> "LoadedModel":
        """The same model with more to say about it; empty notes are dropped."""
        kept = (*self.report.notes, *(note for note in notes if note))
        return replace(self, report=replace(self.report, notes=kept))


@dataclass(frozen=True)
class Needs:
    """What the run asks of a model: its row length, the largest vocabulary among its stores, the seed of fresh weights.

    ``compute_dtype`` is what attention will see where an engine casts the weights itself; None: the weights' dtype.
    ``on_host`` leaves the weights in host memory, from where an engine cuts them up over the devices.
    """

    seq_len: int
    vocab_size: int
    seed: int
    compute_dtype: torch.dtype | None = None
    on_host: bool = False


def build_model(
    section: ModelSection, needs: Needs, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """The model that ``section`` describes, in ``dtype`` on ``device``, with the attention back-end set.

    ``dtype`` holds the weights; an engine that keeps fp32 masters should get fp32 here and cast for itself.

    Raises:
        ConfigError: anything the user can fix, see the module docstring.
    """
    device = torch.device(device)
    choice = kernels.resolve_backend(section.attention, device=device, dtype=needs.compute_dtype or dtype)
    config = read_model_config(section, vocab_size=needs.vocab_size)
    rope = change_base(config, section.rope_theta, seq_len=needs.seq_len) if section.rope_theta else ""
    check_fit(config, needs)
    fresh = section.fresh is not None
    unexpected: tuple[str, ...] = ()
    switched_off = _switch_off_dropout(config, keep=fresh_mapping(section.fresh) if section.fresh is not None else {})
    if fresh:
        model = _initialise(config, seed=needs.seed, dtype=dtype)
    else:
        model, unexpected = _load(section, config, dtype)
    fused = _prepare(model, section, choice, device)
    _refuse_hidden_state(model)
    names = tuple(name for name, _ in model.named_parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    report = BuildReport(
        origin="a fresh configuration" if fresh else str(section.init_from),
        family=config.model_type,
        attention=choice.name,
        parameters=total,
        loaded_parameters=0 if fresh else total,
        unexpected=unexpected,
        newly_initialised=names if fresh else (),
        dropout_switched_off=switched_off,
    )
    return LoadedModel(model if needs.on_host else model.to(device), report).noting(_passed_over(choice), fused, rope)


def build_from_config(
    saved: Mapping[str, Any], section: ModelSection, needs: Needs, *, device: torch.device | str = "cpu"
) -> LoadedModel:
    """A model with the whole config of an earlier one (a checkpoint's), in fp32, its weights still to be filled in.

    Unlike a fresh mapping, which a person typed, its keys are not checked for typing errors: a config.json may hold
    any.
    """
    from transformers import AutoConfig

    device = torch.device(device)
    choice = kernels.resolve_backend(section.attention, device=device, dtype=needs.compute_dtype or torch.float32)
    config = AutoConfig.for_model(**saved)
    rope = change_base(config, section.rope_theta, seq_len=needs.seq_len) if section.rope_theta else ""
    check_fit(config, needs)
    model = _initialise(config, seed=needs.seed, dtype=torch.float32)
    fused = _prepare(model, section, choice, device)
    total = sum(parameter.numel() for parameter in model.parameters())
    report = BuildReport("a checkpoint", config.model_type, choice.name, parameters=total, loaded_parameters=total)
    return LoadedModel(model if needs.on_host else model.to(device), report).noting(_passed_over(choice), fused, rope)


def _prepare(model: torch.nn.Module, section: ModelSection, choice: kernels.Choice, device: torch.device) -> str:
    """Set the kernels of a new model; returns what was chosen for its norms, positions and MLPs."""
    fused = apply_liger(model, section.kernels, device=device)
    if section.kernels == "auto" and device.type == "cpu" and (lean := apply_lean(model)):
        fused += f"; in fewer passes: {lean}"
    kernels.prepare_model(model, choice.name, device=device)
    return fused


def _passed_over(choice: kernels.Choice) -> str:
    return (
        f"attention: {choice.name}, the fastest that can run here; not {choice.passed_over}"
        if choice.passed_over
        else ""
    )


def _refuse_hidden_state(model: torch.nn.Module) -> None:
    """Checkpoints hold parameters; a family with trained state outside them would lose it at every resume."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    hidden = sorted(set(model.state_dict()) - parameters)
    if hidden:
        rule = f"keeps state in buffers ({some(hidden)}), which checkpoints do not hold"
        raise ConfigError(Problem("model", type(model).__name__, rule, "use another model family"))


# --- configuration ----------------------------------------------------------------------------------------------------


def check_fit(config: Any, needs: Needs) -> None:
    """Raises ConfigError where rows are longer than the model's positions or the stores' vocabulary exceeds the
    model's.
    """
    text = config.get_text_config()
    problems = []
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and needs.seq_len > limit:
        rule = f"the model has {limit} positions (max_position_embeddings)"
        fix = f"set data.seq_len={limit} or less"
        if has_rotary_positions(config):
            fix += ", or model.rope_theta to train it on longer rows (500000 in arXiv 2309.16039)"
        problems.append(Problem("data.seq_len", needs.seq_len, rule, fix))
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
        rule = f"its weights cannot be loaded ({first_line(error)})"
        raise ConfigError(
            Problem("model.init_from", origin, rule, "check that config.json belongs to the weights")
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        rule = f"its files lack {len(missing)} weights of the model: {some(missing)}"
        raise ConfigError(
            Problem("model.init_from", origin, rule, "use a complete checkpoint; none is filled in at random")
        )
    broken = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if broken:
        rule = f"weights hold NaN or infinity: {some(broken)}"
        raise ConfigError(Problem("model.init_from", origin, rule, "use a checkpoint from before they broke"))
    return model, tuple(sorted(info["unexpected_keys"]))


def _check_safetensors(folder: Path, origin: str) -> None:
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            rule = f"{path.name} is damaged or cut short ({first_line(error)})"
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
        problems.append(Problem(origin, some(missing), "weights of the model are missing"))
    if problems:
        raise ConfigError(*problems[:10])


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, tied ones once: what ``load_tensors`` and ``export_checkpoint`` take."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
