"""The input generator: a CaseSpec and a seed become the op's keyword arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...varlen.layout import SequenceLayout
from .case import CaseSpec
from .dtypes import dtype_of

__all__ = ["DRAWN_ON_HOST", "GUARD_SLOTS", "Inputs", "make_inputs"]

#: Slots allocated before the first and after the last slot the op is given; nothing may ever write there.
GUARD_SLOTS = 1

#: Most values of states that are drawn on the host, whatever the device. Of 2**28 values, as in a pool that no cache
#: holds, the host would draw for seconds.
DRAWN_ON_HOST = 1 << 22


@dataclass(eq=False)
class Inputs:
    """One made-up call.

    Attributes:
        kwargs: the op's arguments by name.
        pool_storage: ``[GUARD_SLOTS + slots + GUARD_SLOTS, ...]`` behind the pool, None without one.
        intermediate_storage: the same behind the intermediate states' buffer.
    """

    spec: CaseSpec
    kwargs: dict[str, Any]
    pool_storage: torch.Tensor | None
    intermediate_storage: torch.Tensor | None

    def clone(self) -> Inputs:
        """A deep copy: written tensors fresh, with the same strides; read-only ones too."""
        pool, steps = _clone(self.pool_storage), _clone(self.intermediate_storage)
        kwargs = {name: _clone(value) for name, value in self.kwargs.items()}
        if pool is not None:
            kwargs["initial_state_source"] = pool[GUARD_SLOTS:-GUARD_SLOTS]
        if steps is not None:
            kwargs["intermediate_states_buffer"] = steps[GUARD_SLOTS:-GUARD_SLOTS]
        return Inputs(self.spec, kwargs, pool, steps)


def _clone(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_contiguous():
        return value.clone()
    # Keep gaps in storage: a strided view must stay strided.
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    storage = torch.zeros(span, dtype=value.dtype, device=value.device)
    copy = storage.as_strided(value.shape, value.stride())
    return copy.copy_(value)


def make_inputs(spec: CaseSpec, seed: int | None = None, device: torch.device | str = "cpu") -> Inputs:
    """Make up the call ``spec`` describes.

    Same spec and seed give the same bits on every device, but for states of more than ``DRAWN_ON_HOST`` values, which
    a GPU draws itself.
    """
    g = torch.Generator().manual_seed(spec.seed if seed is None else seed)
    randn, rand = partial(torch.randn, generator=g), partial(torch.rand, generator=g)
    n, tokens = spec.n, spec.tokens + (spec.extra_rows if spec.varlen else 0)
    gate = (spec.hv, spec.k) if spec.is_kda else (spec.hv,)

    A_log, a, bias = _gate_values(spec, tokens, gate, randn, rand)
    q, k, v, b = (
        randn(tokens, spec.h, spec.k),
        randn(tokens, spec.h, spec.k),
        randn(tokens, spec.hv, spec.v),
        randn(tokens, spec.hv),
    )
    if spec.distribution == "extreme":
        b = b * 6
    if spec.distribution == "equal_keys":
        k = k[:1].expand_as(k).clone() if tokens else k
        b = b + 4
    if spec.distribution == "tiny_keys":
        k, q = k * 1e-3, q * 1e-4
    if spec.distribution == "large_values":
        v = v * 1e3
    if not spec.l2norm:
        k = k * spec.k**-0.5  # keeps beta * ||k||^2 <= 2: without it the recurrence itself diverges
        if spec.neg_eigval:
            k = k * 0.7

    io, gates = dtype_of(spec.io_dtype), dtype_of(spec.gate_dtype)
    kwargs: dict[str, Any] = {
        "A_log": A_log.to(dtype_of(spec.A_log_dtype)),
        "a": a.to(gates),
        "dt_bias": bias.to(dtype_of(spec.dt_bias_dtype)),
        "softplus_beta": spec.softplus_beta,
        "softplus_threshold": spec.softplus_threshold,
        "q": q.to(io),
        "k": k.to(io),
        "v": v.to(io),
        "b": b.to(gates),
        "scale": spec.scale,
        "use_qk_l2norm_in_kernel": spec.l2norm,
        "is_kda": spec.is_kda,
        "lower_bound": spec.lower_bound,
        "allow_neg_eigval": spec.neg_eigval,
        "state_layout": spec.state_layout,
    }
    kwargs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    _shape_batch(spec, kwargs, n, tokens)
    if spec.varlen:
        kind = dtype_of(spec.cu_dtype)
        layout = SequenceLayout.from_lengths(spec.lengths, device, kind)
        kwargs["cu_seqlens"] = layout if spec.as_layout else layout.cu_seqlens
    pool = _state(spec, kwargs, n, g, device)
    steps = _verification(spec, kwargs, n, g, device)
    return Inputs(spec, kwargs, pool, steps)


def _gate_values(spec: CaseSpec, tokens: int, gate: tuple[int, ...], randn: Any, rand: Any) -> tuple[Any, Any, Any]:
    A_log = torch.log(rand(spec.hv) * 15 + 1)
    a, bias = randn(tokens, *gate), randn(*gate) * 0.5
    match spec.distribution:
        case "long_memory":
            A_log, a = torch.log(rand(spec.hv) * 0.1 + 0.01), a - 4
        case "strong_decay":
            A_log, a = torch.log(rand(spec.hv) * 15 + 8), a.abs() + 2
        case "extreme":
            A_log, a, bias = torch.linspace(-6, 6, spec.hv), a * 15, bias * 8
        case "uniform_gate":
            A_log, a, bias = torch.zeros(spec.hv), rand(tokens, *gate), torch.zeros(gate)
        case "narrow_gate":
            A_log, a, bias = randn(spec.hv) * 0.1, a * 0.1, bias * 0.2
        case "equal_keys":
            A_log, a = torch.log(rand(spec.hv) * 0.1 + 0.01), a - 3
        case _:
            pass
    return A_log, a, bias


def _shape_batch(spec: CaseSpec, kwargs: dict[str, Any], n: int, tokens: int) -> None:
    """Give q, k, v, a, b their batch shape and the strides the case asks for."""
    batch, length = (1, tokens) if spec.varlen else (n, spec.lengths[0] if n else 0)
    if not spec.varlen and len(set(spec.lengths)) > 1:
        raise ValueError(f"case {spec.name!r}: lengths must be equal with varlen=False, given {spec.lengths}")
    names = ("q", "k", "v", "a", "b")
    shaped = {x: kwargs[x].reshape(batch, length, *kwargs[x].shape[1:]) for x in names}
    if spec.strides == "rows":
        shaped.update(_packed_row({x: shaped[x] for x in ("q", "k", "v")}))
        shaped.update(_packed_row({x: shaped[x] for x in ("b", "a")}))
    elif spec.strides == "any":
        shaped = {x: _every_other(t) for x, t in shaped.items()}
        kwargs["A_log"], kwargs["dt_bias"] = _every_other(kwargs["A_log"]), _every_other(kwargs["dt_bias"])
    kwargs.update(shaped)


def _packed_row(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views into one projection's output row, as engines pass them: token stride larger than the heads."""
    flat = [t.flatten(2) for t in parts.values()]
    row = torch.cat([*flat, torch.full_like(flat[0][..., :3], float("nan"))], dim=-1)
    views, at = {}, 0
    for (name, t), f in zip(parts.items(), flat, strict=True):
        views[name] = row[..., at : at + f.shape[-1]].unflatten(-1, t.shape[2:])  # type: ignore[no-untyped-call]
        at += f.shape[-1]
    return views


def _every_other(t: torch.Tensor) -> torch.Tensor:
    """The same values, two elements apart, with NaN between them."""
    wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def _state(
    spec: CaseSpec, kwargs: dict[str, Any], n: int, g: torch.Generator, device: torch.device | str
) -> torch.Tensor | None:
    if spec.state_dtype is None:
        return None
    inner = (spec.hv, spec.k, spec.v) if spec.state_layout == "kv" else (spec.hv, spec.v, spec.k)
    separate = spec.update == "separate"
    slots = (2 if separate else 1) * n + spec.extra_slots
    values = _normal((slots + 2 * GUARD_SLOTS, *inner), g, device)
    if spec.distribution == "large_values":
        values = values * 1e3
    dtype = dtype_of(spec.state_dtype)
    values = values.to(dtype).to(device)
    if spec.strides == "rows":  # slots further apart than a state: other layers' caches lie between
        storage = torch.zeros(values.shape[0], values[0].numel() + 24, dtype=dtype, device=device)
        view = storage[:, : values[0].numel()].unflatten(1, inner)  # type: ignore[no-untyped-call]
        values = view.copy_(values)
    elif spec.strides == "any":
        values = _every_other(values)
    order = torch.randperm(slots, generator=g)
    index = dtype_of(spec.index_dtype)
    read = order[:n].clone()
    read[list(spec.padded)] = -1
    kwargs["initial_state_source"] = values[GUARD_SLOTS:-GUARD_SLOTS]
    if separate:
        write = order[n : 2 * n].clone()
        write[list(spec.padded)] = -1
        read[list(spec.fresh)] = -1
        kwargs["output_state_indices"] = write.to(index).to(device)
    kwargs["initial_state_indices"] = read.to(index).to(device)
    if spec.update == "disabled":
        kwargs["disable_state_update"] = True
    return values


def _normal(shape: tuple[int, ...], g: torch.Generator, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cuda" and math.prod(shape) > DRAWN_ON_HOST:
        seed = int(torch.randint(1 << 62, (1,), generator=g))
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    return torch.randn(shape, generator=g)


def _verification(
    spec: CaseSpec, kwargs: dict[str, Any], n: int, g: torch.Generator, device: torch.device | str
) -> torch.Tensor | None:
    if spec.verify == "none":
        return None
    longest = max(spec.lengths, default=0)
    inner = (spec.hv, spec.k, spec.v) if spec.state_layout == "kv" else (spec.hv, spec.v, spec.k)
    rows, steps = n + 2, longest + 1
    storage = _normal((rows + 2 * GUARD_SLOTS, steps, *inner), g, device)
    storage = storage.to(dtype_of(spec.intermediate_dtype)).to(device)
    index = dtype_of(spec.index_dtype)
    which = torch.randperm(rows, generator=g)[:n]
    which[list(spec.padded)] = -1
    kwargs["intermediate_states_buffer"] = storage[GUARD_SLOTS:-GUARD_SLOTS]
    kwargs["intermediate_state_indices"] = which.to(index).to(device)
    if spec.verify == "tree":
        draw = torch.rand(n, steps, generator=g)
        step = torch.arange(steps)
        parents = (draw * step).long().clamp(max=steps)  # uniform over earlier steps
        parents[:, :1] = -1
        if steps > 3:
            parents[:, 3] = -1  # a second root: starts from the sequence's own start
        parents[step >= torch.tensor(spec.lengths)[:, None]] = steps  # nobody's: such a step there is not
        kwargs["retrieve_parent_token"] = parents.to(index).to(device)
    return storage
