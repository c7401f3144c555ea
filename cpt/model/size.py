"""Arithmetic on a Hugging Face config mapping: parameters and FLOPs. No torch, no weights, no network.

Owns the closed forms for the families below. A family that is not in ``FAMILIES`` gives None: the caller then builds
the model and counts. Memory is ``cpt.model.memory``'s. Two conventions of model FLOPs, recomputation in neither:

- ``flops_per_token``, announced before a start, is PaLM appendix B (arXiv 2204.02311): ``6 N + 12 L H Q T`` with N all
  weights but those of a table that is only looked up, L layers, H heads of size Q, T the row length. The attention
  term is neither halved for causality nor shortened at document boundaries, so it says the same of every corpus.
- ``exact_flops``, behind every measured MFU, counts matrix products alone (no norms, no biases) and, for attention,
  12 H Q for every (query, key) pair that is really attended: causal, inside one document, inside a sliding window.

Worked example (Llama, D=8, I=16, V=10, 1 layer, 2 heads of 4, tied): table 80; attention 4*8*8 = 256; MLP 3*8*16 =
384; norms 3*8 = 24: 744 parameters, all of them in N.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


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
class Flops:
    """Model FLOPs of training, forward and backward: of a token without attention, and of one attended (query, key)
    pair over all layers.
    """

    per_token: int
    per_pair: int

    def of(self, *, tokens: int, pairs: int) -> int:
        return tokens * self.per_token + pairs * self.per_pair


def exact_flops(config: Config, *, matmul_weights: int | None = None) -> Flops | None:
    """What a step really multiplies: 2 FLOPs per weight and token forward and 4 backward; per pair and head of size Q
    4 Q forward (scores and mixing) and 8 Q backward.

    ``matmul_weights`` (``cpt.model.active``, counted in the built model) serves families without a closed form; None
    where neither is known.
    """
    shape = model_shape(config)
    if shape is not None:
        return Flops(6 * matmul_parameters(shape), 12 * shape.num_layers * shape.attention_width)
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if matmul_weights is None:
        return None
    width = (config.get("head_dim") or config.get("hidden_size", 0) // heads) * heads if heads else 0
    return Flops(6 * matmul_weights, 12 * (layers or 0) * width)


def matmul_parameters(shape: Shape) -> int:
    """Weights that every token is multiplied with, the output head among them."""
    attention = shape.width * (2 * shape.attention_width + 2 * shape.kv_width)
    mlp = (3 if shape.gated_mlp else 2) * shape.width * shape.mlp_width
    return shape.num_layers * (attention + mlp) + shape.vocab_size * shape.width


def layer_windows(config: Config) -> tuple[int | None, ...]:
    """The sliding window of every layer, None for full attention; empty where the mapping tells no layers."""
    layers, window = int(config.get("num_hidden_layers") or config.get("n_layer") or 0), config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if config.get("use_sliding_window", True) else None,) * layers


def render_count(number: float, unit: str = "") -> str:
    """``1_234_567`` -> ``"1.23 M"``: three significant digits, decimal prefixes."""
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()
