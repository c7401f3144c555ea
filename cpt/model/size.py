"""Arithmetic on a Hugging Face config mapping: parameters, FLOPs per token, memory per rank. No torch, no weights, no
network.

Owns the closed forms for the families below. A family that is not in ``FAMILIES`` gives None: the caller then builds
the model and counts. Conventions, so that figures can be compared with other trainers:

- ``flops_per_token`` is PaLM appendix B (arXiv 2204.02311): ``6 N + 12 L H Q T`` with N the weights that take part in
  a matrix product (everything but a look-up table that is not also the output head), L layers, H heads of size Q, T
  the row length. The attention term is neither halved for causality nor shortened at document boundaries.
- Memory counts what training must hold; allocator fragmentation, the CUDA context and communication buffers come on
  top.

Worked example (Llama, D=8, I=16, V=10, 1 layer, 2 heads of 4, tied): table 80; attention 4*8*8 = 256; MLP 3*8*16 =
384; norms 3*8 = 24: 744 parameters, all of them in N.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
Precision = Literal["fp32", "bf16"]
ZeroStage = Literal[0, 1, 2, 3]

COMPUTE_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes that the closed forms need, one meaning for every family."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    gated_mlp: bool
    tied: bool
    learned_positions: int = 0
    norm_weights: int = 1  # 2 where a norm also has a bias
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def attention_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim


# What transformers assumes where a mapping is silent; a test compares these with the library.
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"intermediate_size": 11008},
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "attention_bias": True,
    },
    "gpt2": {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
}


def _gated(config: Config, *, qkv_bias: bool, out_bias: bool, mlp_bias: bool = False, qk_norm: bool = False) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        gated_mlp=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _llama(config: Config) -> Shape:
    bias = bool(config.get("attention_bias", False))
    return _gated(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Config) -> Shape:
    return _gated(config, qkv_bias=False, out_bias=False)


def _qwen2(config: Config) -> Shape:
    return _gated(config, qkv_bias=True, out_bias=False)


def _qwen3(config: Config) -> Shape:
    bias = bool(config.get("attention_bias", False))
    return _gated(config, qkv_bias=bias, out_bias=bias, qk_norm=True)


def _gpt_neox(config: Config) -> Shape:
    heads, bias = config["num_attention_heads"], bool(config["attention_bias"])
    return Shape(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        gated_mlp=False,
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_weights=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
    )


def _gpt2(config: Config) -> Shape:
    return Shape(
        vocab_size=config["vocab_size"],
        width=config["n_embd"],
        num_layers=config["n_layer"],
        num_heads=config["n_head"],
        num_kv_heads=config["n_head"],
        head_dim=config["n_embd"] // config["n_head"],
        mlp_width=config.get("n_inner") or 4 * config["n_embd"],
        gated_mlp=False,
        tied=bool(config.get("tie_word_embeddings", True)),
        learned_positions=config["n_positions"],
        norm_weights=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


FAMILIES: dict[str, Callable[[Config], Shape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}


def model_shape(config: Config) -> Shape | None:
    """Sizes of a model from its Hugging Face config mapping; None for a family without a closed form."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        return None
    given = {key: value for key, value in config.items() if value is not None}
    return FAMILIES[family](DEFAULTS[family] | given)


def num_parameters(config: Config) -> int | None:
    """Trainable parameters, tied weights counted once; None for a family without a closed form."""
    shape = model_shape(config)
    if shape is None:
        return None
    tables = shape.vocab_size * shape.width * (1 if shape.tied else 2) + shape.learned_positions * shape.width
    return tables + shape.num_layers * _layer_parameters(shape) + shape.norm_weights * shape.width


def _layer_parameters(shape: Shape) -> int:
    attention = shape.width * (2 * shape.attention_width + 2 * shape.kv_width)
    attention += (shape.attention_width + 2 * shape.kv_width) * shape.qkv_bias + shape.width * shape.out_bias
    attention += 2 * shape.head_dim * shape.qk_norm
    num_in = 2 if shape.gated_mlp else 1
    mlp = (num_in + 1) * shape.width * shape.mlp_width
    mlp += (num_in * shape.mlp_width + shape.width) * shape.mlp_bias
    return attention + mlp + 2 * shape.norm_weights * shape.width


def flops_per_token(config: Config, seq_len: int, *, num_params: int | None = None) -> int | None:
    """FLOPs to train on one token (forward and backward) in rows of ``seq_len`` tokens, by the convention of the
    module docstring.

    ``num_params`` (a count of the built model) serves the families without a closed form: all of it is taken for N
    and, where the mapping does not tell layers and width, the attention term is left out. None when nothing is known.
    """
    shape = model_shape(config)
    total = num_parameters(config)
    if shape is None or total is None:
        if num_params is None:
            return None
        width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
        return 6 * num_params + (12 * layers * width * seq_len if layers and width else 0)
    looked_up = shape.learned_positions * shape.width + (0 if shape.tied else shape.vocab_size * shape.width)
    return 6 * (total - looked_up) + 12 * shape.num_layers * shape.attention_width * seq_len


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one rank must hold while training."""

    weights: int
    gradients: int
    master_weights: int
    adam_moments: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master_weights + self.adam_moments + self.activations


def training_memory_bytes(
    num_params: int, *, zero_stage: ZeroStage, world_size: int, precision: Precision, activations: int = 0
) -> MemoryEstimate:
    """Memory per rank under ZeRO (arXiv 1910.02054, figure 1): stage 1 splits the optimizer, 2 also gradients, 3 also
    weights.

    Under bf16 a parameter costs 2 + 2 + 4 + 8 bytes (weight, gradient, fp32 master, two fp32 moments). Under fp32 it
    costs 4 + 4 + 8, and from stage 1 on DeepSpeed keeps its own flat fp32 copy of the rank's part, counted as a
    master weight. ``activations`` comes from ``activation_bytes``.
    """
    compute = COMPUTE_BYTES[precision]
    own = -(-num_params // world_size)
    has_master = precision == "bf16" or zero_stage >= 1
    optimizer_part = own if zero_stage >= 1 else num_params
    return MemoryEstimate(
        weights=compute * (own if zero_stage >= 3 else num_params),
        gradients=compute * (own if zero_stage >= 2 else num_params),
        master_weights=4 * optimizer_part if has_master else 0,
        adam_moments=8 * optimizer_part,
        activations=activations,
    )


def activation_bytes(config: Config, *, seq_len: int, micro_batch_size: int, precision: Precision) -> int | None:
    """Activations kept for the backward pass of one micro-batch, without gradient checkpointing; None for an unknown
    family.

    Per token and layer, in the compute dtype: the inputs of both norms, of the projections and of the MLP (6 widths),
    queries, keys, values and the attention output, and the hidden MLP values (4 per gated unit, else 2). The score
    matrix is not kept: every back-end here is a fused one (arXiv 2205.05198 counts it separately). The logits come on
    top: compute dtype, fp32 copy and fp32 gradient.
    """
    shape = model_shape(config)
    if shape is None:
        return None
    attention = 6 * shape.width + 2 * shape.attention_width + 2 * shape.kv_width
    mlp = (4 if shape.gated_mlp else 2) * shape.mlp_width
    compute = COMPUTE_BYTES[precision]
    per_token = compute * shape.num_layers * (attention + mlp) + (compute + 8) * shape.vocab_size
    return per_token * seq_len * micro_batch_size


def render_count(number: float, unit: str = "") -> str:
    """``1_234_567`` -> ``"1.23 M"``: three significant digits, decimal prefixes."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def render_size(num_params: int, flops: int | None, memory: MemoryEstimate) -> str:
    """The lines shown before a run starts: parameters, FLOPs per token, memory per rank and its parts."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "fp32 masters": memory.master_weights,
        "Adam moments": memory.adam_moments,
        "activations": memory.activations,
    }
    shown = " + ".join(f"{name} {render_count(size, 'B')}" for name, size in parts.items() if size)
    return "\n".join(
        (
            f"parameters       {render_count(num_params)} ({num_params:,})",
            f"FLOPs per token  {render_count(flops) if flops is not None else 'unknown for this model family'}",
            f"memory per rank  {render_count(memory.total, 'B')} estimated = {shown}",
        )
    )
