"""Another base of a model's rotary positions, for rows longer than it was trained on.

A larger base turns the slow pairs of dimensions slower, so that positions beyond the old length fall into angles the
model knows: adjusted base frequency, arXiv 2309.16039, which trains on at 500,000 instead of 10,000 and changes
nothing else. Pair j of a head of width d turns by base^(-2j/d) per token.

Owns the change in a transformers config, before a model is built from it; the model, its checkpoints and its export
carry it from there. Refuses families without rotary positions, and those that already stretch them by other means.
"""

from typing import Any

from cpt.config import ConfigError, Problem

FIELD = "model.rope_theta"


def has_rotary_positions(config: Any) -> bool:
    """Whether one base, unstretched, describes the positions of this family."""
    return _refusal(config.get_text_config()) is None


def change_base(config: Any, base: float, *, seq_len: int) -> str:
    """Set the base and let the model have at least ``seq_len`` positions; returns what changed, in words.

    Raises:
        ConfigError: no rotary positions, a base for each type of layer, or positions stretched by another rule.
    """
    text = config.get_text_config()
    if reason := _refusal(text):
        raise ConfigError(Problem(FIELD, base, f"{config.model_type} {reason}", "leave model.rope_theta out"))
    before, limit = _base(text), getattr(text, "max_position_embeddings", None)
    if isinstance(getattr(text, "rope_parameters", None), dict):
        text.rope_parameters = {**text.rope_parameters, "rope_theta": float(base)}
    else:
        text.rope_theta = float(base)  # transformers 4
    words = f"rotary positions: base {before:,.0f} -> {base:,.0f}" if before != base else ""
    if isinstance(limit, int) and seq_len > limit:
        text.max_position_embeddings = seq_len
        words += f"{', ' if words else 'rotary positions: '}{limit:,} -> {seq_len:,} positions"
    return words


def _base(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None)
    return float(parameters["rope_theta"] if isinstance(parameters, dict) else text.rope_theta)


def _refusal(text: Any) -> str | None:
    parameters = getattr(text, "rope_parameters", None)
    if not isinstance(parameters, dict):  # transformers 4 keeps two fields
        if getattr(text, "rope_theta", None) is None:
            return "has no rotary positions"
        scaling = getattr(text, "rope_scaling", None) or {}
        parameters = {"rope_theta": text.rope_theta, **scaling, "rope_type": scaling.get("rope_type", "default")}
    if any(isinstance(value, dict) for value in parameters.values()):
        return "has a base for each type of layer"
    if parameters.get("rope_theta") is None:
        return "has no rotary positions"
    kind = parameters.get("rope_type", "default")
    return None if kind == "default" else f"already stretches its positions (rope_type {kind})"
