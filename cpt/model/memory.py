"""Bytes that one rank needs at most while it trains, by formula. No torch, no weights.

Owns the prediction: a list of named terms for every moment of a step at which memory can be highest, of which the
largest counts. Refuses families without a closed form (``cpt.model.size``). It is checked against measured peaks by
``benchmarks/engine/memory_prediction.py``, and on a GPU by ``tests/gpu``.

Where the terms come from, with P parameters, N ranks that shard, n tokens of a micro-batch on this rank:

- Training state: ZeRO (arXiv 1910.02054, figure 1) as DeepSpeed 0.19 lays it out. bf16 has 2 bytes of weight, 4 of
  master and 8 of AdamW's moments per parameter; fp32 has 4 + 8, and from stage 1 on a flat fp32 copy of the rank's
  part as well. Under ZeRO 0 with bf16 the weights are fp32 and autocast keeps a bf16 copy until backward is through.
- Gradients: DeepSpeed's fp32 accumulator (ZeRO 1: whole; 2 and 3: this rank's part), the bucket that gradients travel
  in, and its fp32 copy, for gradients are added up in fp32.
- Activations: what autograd keeps of transformers' blocks (compare arXiv 2205.05198, section 4): a norm that is
  composed of torch's operations keeps its fp32 input, the normalised value and the result; attention keeps queries,
  keys, values, output and a log-sum; a gated MLP keeps four hidden values.
- Loss: 12 bytes per token and vocabulary entry for whole logits (log-softmax and two gradients in fp32); in chunks the
  same for the tokens of a chunk, and the fp32 gradient of the output layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cpt.model.size import Config, Shape, model_shape, num_parameters

Precision = Literal["fp32", "bf16"]
ZeroStage = Literal[0, 1, 2, 3]
Checkpointing = Literal["none", "selective", "full"]
AttentionMemory = Literal["fused", "runs", "mask"]
Terms = dict[str, int]

RUN_TOKENS = 96  # mean length of a masked run on a CPU (``cpt.model.document_runs`` fills them up to 128)
LIVE_WEIGHTS = 1_000_000_000  # elements that ZeRO 3 keeps gathered (DeepSpeed's stage3_max_live_parameters)
ALL_REDUCE = 500_000_000  # elements that ZeRO 0 flattens to reduce at once (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)
CUDA_CONTEXT = 700 * 2**20  # driver context, cuBLAS and cuDNN workspaces on an A100 or H100
NCCL_BUFFERS = 900 * 2**20  # of a job with several ranks
FRAGMENTATION = 0.04  # of what tensors hold: blocks that the allocator cannot use


@dataclass(frozen=True)
class Setting:
    """What decides how much a rank needs, beside the model."""

    seq_len: int
    micro_batch_size: int
    grad_accum_steps: int = 1
    zero_stage: ZeroStage = 0
    world_size: int = 1
    precision: Precision = "bf16"
    checkpointing: Checkpointing = "none"
    on_gpu: bool = True
    attention: AttentionMemory = "fused"
    fused_norms: bool = False  # Liger's, which keep their input alone
    lean: bool = False  # our norms and gates on a CPU (``cpt.model.lean``), which do so where they compute in fp32
    loss_chunk: int | None = None  # tokens; None: whole logits
    optimizer: Literal["adamw", "muon"] = "adamw"
    offload: bool = False  # masters and moments live in host memory
    sequence_parallel: int = 1
    hpz_size: int = 1  # ranks that hold a second copy of the weights together (ZeRO++)
    bucket: int = 500_000_000  # elements (DeepSpeed's reduce_bucket_size)
    num_buckets: int = 1  # two where communication overlaps
    contiguous_gradients: bool = True  # ZeRO 1 and 2 copy gradients into buckets, rather than reduce them in place

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on this rank."""
        return self.seq_len * self.micro_batch_size // self.sequence_parallel

    @property
    def compute_bytes(self) -> int:
        """Of a value in a matrix product."""
        return 2 if self.precision == "bf16" else 4

    @property
    def is_autocast(self) -> bool:
        return self.precision == "bf16" and self.zero_stage == 0

    @property
    def weight_bytes(self) -> int:
        return 4 if self.is_autocast else self.compute_bytes


@dataclass(frozen=True)
class Prediction:
    """Bytes by term at the moment of a step that needs most; ``host`` are those in host memory beside a GPU."""

    moment: str
    terms: Mapping[str, int]
    moments: Mapping[str, int]
    overhead: Mapping[str, int] = field(default_factory=dict)
    host: int = 0

    @property
    def tensors(self) -> int:
        """What torch's allocator hands out at most (``torch.cuda.max_memory_allocated``)."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        """With what the device needs besides: to be compared with its memory."""
        return self.tensors + sum(self.overhead.values())


def predict_memory(config: Config, setting: Setting) -> Prediction | None:
    """The most that a rank needs in a training step; None for a family without a closed form."""
    shape, parameters = model_shape(config), num_parameters(config)
    if shape is None or parameters is None:
        return None
    moments = _moments(shape, parameters, setting)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    tensors = sum(moments[name].values())
    overhead: Terms = {}
    if setting.on_gpu:
        overhead = {"CUDA context": CUDA_CONTEXT, "fragmentation": round(FRAGMENTATION * tensors)}
        if setting.world_size > 1:
            overhead["NCCL"] = NCCL_BUFFERS
    return Prediction(
        moment=name,
        terms={term: size for term, size in moments[name].items() if size},
        moments={moment: sum(terms.values()) for moment, terms in moments.items()},
        overhead=overhead,
        host=_host_bytes(shape, parameters, setting),
    )


def _moments(shape: Shape, parameters: int, setting: Setting) -> dict[str, Terms]:
    """Terms by moment. Between two of them it only moves from one to the other: activations go as gradients come."""
    state = _training_state(shape, parameters, setting)
    kept = kept_activations(shape, setting)
    earlier = _earlier_gradients(parameters, setting)
    compute = state | _gathered(shape, parameters, setting)
    return {
        "loss": compute | earlier | kept | final_norm(shape, setting) | _loss(shape, setting),
        "backward of a block": compute
        | earlier
        | kept
        | _head_gradient(shape, setting)
        | _buckets(setting)
        | _block_at_work(shape, setting),
        "end of backward": (state if setting.is_autocast else compute) | _final_gradients(shape, parameters, setting),
        "optimizer": state | _optimizer_work(shape, parameters, setting),
    }


# --- training state ---------------------------------------------------------------------------------------------------


def _part(parameters: int, setting: Setting) -> int:
    """Parameters whose optimizer state this rank holds. Ranks that share a row shard together."""
    return -(-parameters // setting.world_size) if setting.zero_stage else parameters


def _state_bytes(shape: Shape, parameters: int, setting: Setting) -> float:
    """Of the optimizer, per parameter: AdamW keeps two fp32 moments, Muon one, of the blocks' matrices."""
    if setting.optimizer == "adamw":
        return 8.0
    matrices = shape.num_layers * _block_matrices(shape)
    return 8.0 - 4.0 * matrices / parameters


def _training_state(shape: Shape, parameters: int, setting: Setting) -> Terms:
    stage, part = setting.zero_stage, _part(parameters, setting)
    on_device = 0 if setting.offload and setting.on_gpu else 1
    weights = part if stage == 3 else parameters
    terms = {
        "weights": setting.weight_bytes * weights,
        "fp32 masters": on_device * 4 * part if stage else 0,
        "optimizer moments": on_device * round(_state_bytes(shape, parameters, setting) * part),
    }
    if stage == 1 and setting.precision == "bf16":
        terms["gradients"] = 4 * parameters  # DeepSpeed's accumulator, kept between steps
    if stage == 3:
        terms["gradients"] = on_device * 4 * part
        terms["gradient buckets"] = setting.compute_bytes * setting.bucket * setting.num_buckets
    return terms


def _host_bytes(shape: Shape, parameters: int, setting: Setting) -> int:
    """Masters, moments, fp32 gradients and the pinned copy of the weights that go back to the device."""
    if not (setting.offload and setting.on_gpu and setting.zero_stage):
        return 0
    each = 4 + _state_bytes(shape, parameters, setting) + 4 + setting.compute_bytes
    return round(each * _part(parameters, setting))


def _gathered(shape: Shape, parameters: int, setting: Setting) -> Terms:
    """Whole weights while the model computes: of ZeRO 3 those it does not let go between forward and backward, under
    autocast the bf16 copies of matrices.
    """
    if setting.is_autocast:
        matrices = shape.num_layers * _block_matrices(shape) + shape.vocab_size * shape.width
        return {"bf16 copies of weights": 2 * matrices}
    if setting.zero_stage < 3 or setting.world_size == 1:
        return {}
    second = -(-setting.compute_bytes * parameters // setting.hpz_size) if setting.hpz_size > 1 else 0
    if setting.checkpointing == "full":
        largest = shape.vocab_size * shape.width + 2 * _block_matrices(shape)
        return {
            "gathered weights": setting.weight_bytes * min(parameters, largest),
            "second copy of weights (hpZ)": second,
        }
    whole = setting.weight_bytes * min(parameters, LIVE_WEIGHTS)
    sent = setting.weight_bytes * min(
        parameters, setting.bucket
    )  # parts of several ranks, before they are put together
    return {"gathered weights": whole, "all-gather buffer": sent, "second copy of weights (hpZ)": second}


def _block_matrices(shape: Shape) -> int:
    attention = shape.width * (2 * shape.attention_width + 2 * shape.kv_width)
    return attention + (3 if shape.gated_mlp else 2) * shape.width * shape.mlp_width


# --- gradients --------------------------------------------------------------------------------------------------------


def _earlier_gradients(parameters: int, setting: Setting) -> Terms:
    """Of the micro-batches before this one."""
    if setting.grad_accum_steps == 1:
        return {}
    stage = setting.zero_stage
    if stage == 0:
        return {"gradients": 4 * parameters}
    if stage == 1:
        return _bucket(setting, 4) | (
            # bf16: beside the accumulator, which is there for good
            {"earlier gradients": setting.compute_bytes * parameters}
        )
    return {"gradients": 4 * _part(parameters, setting)} if stage == 2 else {}


def _buckets(setting: Setting) -> Terms:
    """The buffers that gradients are collected in: there from the first gradient on; under ZeRO 1 in bf16 at the end
    only, for gradients go into the accumulator first; under ZeRO 3 for good.
    """
    if setting.zero_stage in (0, 3) or (setting.zero_stage == 1 and setting.precision == "bf16"):
        return {}
    return _bucket(setting, 4 if setting.zero_stage == 1 else setting.compute_bytes)


def _bucket(setting: Setting, each: int) -> Terms:
    """Buffers of ``each`` bytes per element."""
    if not setting.contiguous_gradients:
        return {}
    return {"gradient buckets": each * setting.bucket * setting.num_buckets}


def _final_gradients(shape: Shape, parameters: int, setting: Setting) -> Terms:
    """When the last gradient is there and the ranks add them up."""
    stage, part = setting.zero_stage, _part(parameters, setting)
    several = setting.world_size > 1
    sent = {"gradients in fp32": 4 * min(setting.bucket, parameters) if several else 0}
    if stage == 0:
        table = 4 * shape.vocab_size * shape.width  # the embeddings' own gradient, before it is added to the head's
        flat = 4 * min(parameters, ALL_REDUCE) if several else 0
        return {"gradients": 4 * parameters, "gradient buckets": max(flat, table)}
    if stage == 1:
        whole = (4 if setting.precision == "fp32" else 2 + 4) * parameters
        return {"gradients": whole + 4 * part} | _bucket(setting, 4)
    if stage == 2:
        waiting = setting.compute_bytes * min(setting.bucket, parameters) if several else 0
        bucket = _bucket(setting, setting.compute_bytes) or {"gradient buckets": waiting}
        copied = setting.compute_bytes == 2 or not setting.contiguous_gradients
        return {"gradients": 4 * part} | bucket | (sent if copied else {})
    return sent


def _optimizer_work(shape: Shape, parameters: int, setting: Setting) -> Terms:
    """While the weights move: averaged gradients, and DeepSpeed's flat copy of them."""
    stage, part = setting.zero_stage, _part(parameters, setting)
    if stage == 0:
        terms = {"gradients": 4 * parameters}
    elif stage == 1:
        terms = {
            "gradients": (4 * parameters if setting.precision == "bf16" else 0) + 4 * part,
            "flat gradients": 4 * part,
        }
    elif stage == 2:
        terms = {"gradients": 4 * part, "flat gradients": 4 * part if setting.grad_accum_steps == 1 else 0}
    else:
        terms = {"flat gradients": 4 * part}
    if setting.offload and setting.on_gpu:
        terms["flat gradients"] = 0
    if setting.optimizer == "muon":  # Newton-Schulz: the largest matrix and three of its products in bf16
        terms["orthogonalisation"] = 8 * shape.width * max(shape.mlp_width, shape.attention_width)
    return terms


def _head_gradient(shape: Shape, setting: Setting) -> Terms:
    """Tied to the embeddings, the output layer's gradient waits for theirs; the loss in chunks has it in fp32."""
    table = shape.vocab_size * shape.width
    each = 4 if setting.loss_chunk else setting.weight_bytes
    return {"output layer's gradient": each * table}


# --- activations ------------------------------------------------------------------------------------------------------


def _norm_bytes(width: int, shape: Shape, setting: Setting) -> int:
    """Kept of one norm, per token: fp32 input, normalised value, result (RMSNorm of torch's operations)."""
    residual = 4 if setting.is_autocast else setting.compute_bytes
    if setting.fused_norms or shape.norm_weights == 2:  # one kernel keeps its input; its result feeds the products
        return (residual + setting.compute_bytes) * width
    lean = setting.lean and residual == 4
    if setting.is_autocast:
        return (4 if lean else 8) * width  # the result is cast once for each product: counted there
    if lean:
        return 8 * width
    return (4 + 2 * setting.compute_bytes) * width


def _block_bytes(shape: Shape, setting: Setting) -> int:
    """Kept of one block for the backward pass, per token."""
    each, width, attention, kv = setting.compute_bytes, shape.width, shape.attention_width, shape.kv_width
    casts = 2 * width * (5 if shape.gated_mlp else 2) if setting.is_autocast else 0
    repeated = attention if setting.attention != "fused" and kv != attention else kv
    outputs = 2 if setting.attention == "runs" else 1
    kept = 2 * _norm_bytes(width, shape, setting) + casts + each * ((1 + outputs) * attention + 2 * repeated)
    if shape.qk_norm:
        kept += _norm_bytes(attention + kv, shape, setting)
    return kept + each * _mlp_values(shape, setting) + 4 * shape.num_heads + _mask_bytes(setting)


def _mlp_values(shape: Shape, setting: Setting) -> int:
    if not shape.gated_mlp:
        return 2 * shape.mlp_width
    lean = setting.lean and not setting.is_autocast and setting.compute_bytes == 4
    return (3 if setting.fused_norms or lean else 4) * shape.mlp_width


def _mask_bytes(setting: Setting) -> int:
    """torch's SDPA turns a boolean mask into numbers, in every layer; per token of the row."""
    if setting.attention == "fused":
        return 0
    return setting.compute_bytes * min(setting.seq_len, RUN_TOKENS if setting.attention == "runs" else setting.seq_len)


def _products_bytes(shape: Shape, setting: Setting) -> int:
    """Kept of one block where only matrix products and attention are: their results, per token."""
    values = 2 * shape.attention_width + 2 * shape.kv_width + 2 * shape.width
    values += (2 if shape.gated_mlp else 1) * shape.mlp_width
    return setting.compute_bytes * values + 4 * shape.num_heads


def kept_activations(shape: Shape, setting: Setting) -> Terms:
    tokens, residual = setting.tokens, 4 if setting.is_autocast else setting.compute_bytes
    inputs = residual * shape.width
    per_token = {
        "none": _block_bytes(shape, setting),
        "selective": inputs + _products_bytes(shape, setting),
        "full": inputs,
    }[setting.checkpointing]
    mask = setting.micro_batch_size * setting.seq_len**2 if setting.attention == "mask" else 0
    return {"activations": tokens * shape.num_layers * per_token, "attention mask": mask}


def final_norm(shape: Shape, setting: Setting) -> Terms:
    """Before the output layer; its backward pass is the first, so it is gone when a block's begins."""
    return {"final norm": setting.tokens * _norm_bytes(shape.width, shape, setting)}


def _block_at_work(shape: Shape, setting: Setting) -> Terms:
    """The backward pass of one block: gradients of its hidden values, and the block itself if it is computed again."""
    residual = 4 if setting.is_autocast else setting.compute_bytes
    block = _block_bytes(shape, setting) - residual * shape.width  # its input is there already
    kept = _products_bytes(shape, setting) if setting.checkpointing == "selective" else 0
    again = setting.tokens * max(0, block - kept) if setting.checkpointing != "none" else 0
    values = (2 if shape.gated_mlp else 1) * shape.mlp_width + 2 * shape.width
    return {"a block at work": again + setting.compute_bytes * setting.tokens * values}


def _loss(shape: Shape, setting: Setting) -> Terms:
    vocabulary, tokens = shape.vocab_size, setting.tokens
    if setting.loss_chunk is None:
        return {"loss": 12 * vocabulary * tokens}
    chunk = min(setting.loss_chunk, tokens)
    residual = 4 if setting.is_autocast else setting.compute_bytes
    # Logits and their gradient; in bf16 on a CPU softmax's input and result in fp32 beside the logits, which code
    # compiled for a GPU does not write: there one more buffer in bf16 is allowed for.
    in_bf16 = 6 if setting.on_gpu else 10
    buffers = (8 if setting.compute_bytes == 4 else in_bf16) * vocabulary * chunk
    gradients = residual * tokens * shape.width + 4 * vocabulary * shape.width
    return {"loss": buffers, "output layer's gradient": gradients}


def loss_chunk_tokens(vocab_size: int, *, on_gpu: bool) -> int:
    """Tokens whose logits exist at one time: ``cpt.train.losses.chunk_tokens``, which needs torch; a test holds the two
    together.
    """
    fewest, most, budget = (1024, 16384, 2**30) if on_gpu else (128, 512, 2**25)
    return max(fewest, min(most, budget // (4 * vocab_size)))
