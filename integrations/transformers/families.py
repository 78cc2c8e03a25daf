"""The linear-attention layers of transformers: what of each layer is its own.

All of them project, convolve, run the delta rule, gate and project back; :mod:`.forward` does what they share. Its own
are a layer's projections, the parameters of its gates and how it ends. The layers are read here, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FAMILIES", "Family", "Gates", "Heads", "Projected", "family_of"]


@dataclass(frozen=True, slots=True)
class Heads:
    """Key heads H, value heads HV and their dimensions K, V."""

    h: int
    hv: int
    k: int
    v: int


@dataclass(frozen=True, slots=True)
class Projected:
    """What a layer makes of its input ``[B, T, hidden]`` before it looks at other tokens.

    Attributes:
        qkv: ``[B, T, H * K + H * K + HV * V]``, the input of the convolution.
        a: ``[B, T, HV]``, or ``[B, T, HV * K]`` for KDA; b: ``[B, T, HV]``: raw, as the op takes them.
        z: the output gate, HV * V values a token.
    """

    qkv: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    z: torch.Tensor


@dataclass(frozen=True, slots=True)
class Gates:
    """The op's arguments about gates: A_log ``[HV]``, dt_bias ``[HV]`` or (KDA) ``[HV * K]``, and the kind of gate."""

    A_log: torch.Tensor
    dt_bias: torch.Tensor
    is_kda: bool = False
    lower_bound: float | None = None
    allow_neg_eigval: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One layer class of transformers.

    Attributes:
        module, layer: where the class is, below ``transformers.models``, and its name.
        heads, project, gates, finish: read a layer; ``finish`` takes the rule's output ``[B, T, HV, V]`` and ``z``.
        parts: attributes of the layer whose classes have a forward that ``project`` stands for.
    """

    module: str
    layer: str
    heads: Callable[[Any], Heads]
    project: Callable[[Any, torch.Tensor], Projected]
    gates: Callable[[Any], Gates]
    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    parts: tuple[str, ...] = ()


def _gdn_heads(layer: Any) -> Heads:
    return Heads(layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)


def _kda_heads(layer: Any) -> Heads:
    return Heads(layer.num_heads, layer.num_heads, layer.head_dim, layer.head_dim)


# ---- projections


def _interleaved(layer: Any, x: torch.Tensor) -> Projected:
    """Qwen3-Next: q, k, v, z of a key head lie together, and b, a of it."""
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    return Projected(torch.cat([t.flatten(2) for t in (q, k, v)], dim=-1), a, b, z)


def _separate(layer: Any, x: torch.Tensor) -> Projected:
    """Qwen3.5 and later: q, k, v together, z, b and a each by itself."""
    return Projected(layer.in_proj_qkv(x), layer.in_proj_a(x), layer.in_proj_b(x), layer.in_proj_z(x))


def _olmo(layer: Any, x: torch.Tensor) -> Projected:
    return Projected(_qkv(layer, x), layer.a_proj(x), layer.b_proj(x), layer.g_proj(x))


def _kda(layer: Any, x: torch.Tensor) -> Projected:
    """Kimi-Linear, GLM: gates by way of a narrow layer."""
    gate = layer.forget_gate
    a, z = gate.f_b_proj(gate.f_a_proj(x)), layer.g_b_proj(layer.g_a_proj(x))
    return Projected(_qkv(layer, x), a, layer.b_proj(x), z)


def _kda_direct(layer: Any, x: torch.Tensor) -> Projected:
    return Projected(_qkv(layer, x), layer.forget_gate.f_proj(x), layer.b_proj(x), layer.g_proj(x))


def _qkv(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)


# ---- gates


def _gdn_gates(layer: Any) -> Gates:
    return Gates(layer.A_log, layer.dt_bias)


def _olmo_gates(layer: Any) -> Gates:
    return Gates(layer.A_log, layer.dt_bias, allow_neg_eigval=bool(layer.allow_neg_eigval))


def _kimi_gates(layer: Any) -> Gates:
    return Gates(layer.forget_gate.A_log.flatten(), layer.forget_gate.dt_bias, is_kda=True)


def _glm_gates(layer: Any) -> Gates:
    gate = layer.forget_gate
    return Gates(gate.A_log, gate.dt_bias, is_kda=True, lower_bound=gate.safe_gate_lower_bound)


def _bailing_gates(layer: Any) -> Gates:
    gate = layer.forget_gate
    return Gates(gate.A_log, gate.dt_bias, is_kda=True, lower_bound=gate.lower_bound if gate.safe_gate else None)


# ---- endings


def _rows(layer: Any, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Normalised and gated one head at a time, then projected."""
    gated = layer.norm(o.reshape(-1, o.shape[-1]), z.reshape(-1, o.shape[-1]))
    projected: torch.Tensor = layer.out_proj(gated.reshape(*o.shape[:2], -1))
    return projected


def _olmo_rows(layer: Any, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    gated = layer.o_norm(o.reshape(-1, o.shape[-1]), z.reshape(-1, o.shape[-1]))
    projected: torch.Tensor = layer.o_proj(gated.reshape(*o.shape[:2], -1))
    return projected


def _heads(layer: Any, o: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    gated = layer.o_norm(o, z.view(o.shape)).reshape(*o.shape[:2], -1)
    projected: torch.Tensor = layer.o_proj(gated)
    return projected


_GATE = ("forget_gate",)

FAMILIES = (
    Family("qwen3_next", "Qwen3NextGatedDeltaNet", _gdn_heads, _interleaved, _gdn_gates, _rows),
    Family("qwen3_5", "Qwen3_5GatedDeltaNet", _gdn_heads, _separate, _gdn_gates, _rows),
    Family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", _gdn_heads, _separate, _gdn_gates, _rows),
    Family("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", _gdn_heads, _separate, _gdn_gates, _rows),
    Family("olmo_hybrid", "OlmoHybridGatedDeltaNet", _gdn_heads, _olmo, _olmo_gates, _olmo_rows),
    Family("kimi_linear", "KimiLinearDeltaAttention", _kda_heads, _kda, _kimi_gates, _heads, _GATE),
    Family("glm5_next", "Glm5NextTextLinearAttention", _kda_heads, _kda, _glm_gates, _heads, _GATE),
    Family("bailing_hybrid", "BailingHybridDeltaAttention", _kda_heads, _kda_direct, _bailing_gates, _heads, _GATE),
)


def family_of(layer: object) -> Family | None:
    """The family of a module, or of the class it is derived from; None for anything else."""
    names = {(cls.__module__, cls.__qualname__) for cls in type(layer).__mro__}
    for family in FAMILIES:
        if (f"transformers.models.{family.module}.modeling_{family.module}", family.layer) in names:
            return family
    return None
