"""From the caller's arguments to a Call: every structural check, before anything is written.

Nothing here reads device memory; slots and rows on the host are looked at. Checks that need the values on a device are
in ``validate_values``.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ....errors import ArgumentTypeError, ArgumentValueError
from ...varlen.graph_layout import GraphLayout
from ...varlen.layout import SequenceLayout
from ...varlen.offsets import check_offsets
from .call import Call
from .dtypes import FLOAT_DTYPES, INDEX_DTYPES
from .host_indices import check_host_indices
from .memory import overlaps_itself

__all__ = ["as_gate", "canonical_call"]

#: Kernels compute in float32: a scalar must survive there, and a positive one must not be flushed to zero.
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


def canonical_call(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | SequenceLayout | GraphLayout | None = None,
    *,
    state_layout: str = "kv",
    is_kda: bool = False,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    output_state_indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Call:
    """Check one call's arguments and return them in canonical form (see :class:`Call` for shapes).

    Raises:
        ArgumentTypeError: something is no tensor, or has a dtype the contract does not list.
        ArgumentValueError: wrong rank, shape, device, value or combination; host-known offsets that are
            empty, do not start at 0, decrease, or run past T; slots or rows on the host beyond their pool.
    """
    floats = {"A_log": A_log, "a": a, "dt_bias": dt_bias, "q": q, "k": k, "v": v, "b": b}
    for name, tensor in floats.items():
        _float_tensor(name, tensor)
    _flag("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    _flag("is_kda", is_kda)
    _flag("allow_neg_eigval", allow_neg_eigval)
    _flag("disable_state_update", disable_state_update)
    if state_layout not in ("kv", "vk"):
        raise ArgumentValueError(
            "state_layout", "'kv' ([slots, HV, K, V]) or 'vk' ([slots, HV, V, K])", repr(state_layout)
        )

    # q, k, v
    for name in ("q", "k", "v"):
        if floats[name].dim() != 4:
            raise ArgumentValueError(name, "shape [B, T, heads, dim]", _shape(floats[name]))
    batch, length, heads, key_dim = q.shape
    if heads < 1 or key_dim < 1:
        raise ArgumentValueError("q", "at least one head and K >= 1", _shape(q))
    _expect_shape("k", k, (batch, length, heads, key_dim), "q's shape [B, T, H, K]")
    if v.shape[:2] != (batch, length):
        raise ArgumentValueError("v", f"shape [{batch}, {length}, HV, V], as q's B and T", _shape(v))
    value_heads, value_dim = v.shape[2], v.shape[3]
    if value_heads < 1 or value_dim < 1:
        raise ArgumentValueError("v", "at least one head and V >= 1", _shape(v))
    if value_heads % heads:
        raise ArgumentValueError("v", f"HV a multiple of H = {heads}", f"HV = {value_heads}")
    for name in ("k", "v"):
        if floats[name].dtype != q.dtype:
            raise ArgumentTypeError(name, f"q's dtype {q.dtype}", str(floats[name].dtype))

    # gates
    gate = (value_heads, key_dim) if is_kda else (value_heads,)
    a = as_gate("a", a, batch, length, gate)
    b = as_gate("b", b, batch, length, (value_heads,))
    _expect_shape("A_log", A_log, (value_heads,), "[HV]")
    if is_kda and dt_bias.dim() == 1 and dt_bias.numel() == value_heads * key_dim:
        dt_bias = dt_bias.unflatten(0, gate)  # type: ignore[no-untyped-call]
    _expect_shape("dt_bias", dt_bias, gate, "[HV, K] (or [HV * K]) for KDA" if is_kda else "[HV]")
    device = q.device
    for name, tensor in floats.items():
        _same_device(name, tensor, device)

    # scalars
    beta = _positive("softplus_beta", softplus_beta)
    threshold = _positive("softplus_threshold", softplus_threshold)
    scale_value = key_dim**-0.5 if scale is None else _positive("scale", scale)
    if lower_bound is not None:
        lower_bound = _number("lower_bound", lower_bound)
        if not is_kda:
            raise ArgumentValueError("lower_bound", "None unless is_kda=True", str(lower_bound))
        if lower_bound >= 0:
            raise ArgumentValueError(
                "lower_bound", "a negative number (g = lower_bound * sigmoid(...))", str(lower_bound)
            )

    # sequences
    layout: SequenceLayout | None = None
    cu: torch.Tensor | None = None
    if isinstance(cu_seqlens, SequenceLayout):
        layout, cu = cu_seqlens, cu_seqlens.cu_seqlens
    elif isinstance(cu_seqlens, GraphLayout):
        cu = cu_seqlens.cu_seqlens
        max_seqlen = cu_seqlens.max_length if max_seqlen is None else max_seqlen
        if cu_seqlens.max_tokens is not None and cu_seqlens.max_tokens > length:
            expected = f"a GraphLayout of at most T = {length} tokens"
            raise ArgumentValueError("cu_seqlens", expected, f"max_tokens = {cu_seqlens.max_tokens}")
    elif cu_seqlens is not None:
        cu = cu_seqlens
    if cu is not None:
        _index_tensor("cu_seqlens", cu)
        if cu.dim() != 1 or cu.shape[0] < 1:
            raise ArgumentValueError("cu_seqlens", "shape [N + 1], N >= 0", _shape(cu))
        _same_device("cu_seqlens", cu, device)
        if not cu.is_contiguous():
            raise ArgumentValueError("cu_seqlens", "a contiguous tensor", f"stride {cu.stride(0)}")
        if batch != 1:
            raise ArgumentValueError("q", "B = 1 with cu_seqlens (sequences packed along T)", f"B = {batch}")
        if layout is not None or not cu.is_cuda:
            offsets = layout.offsets if layout is not None else tuple(cu.tolist())
            check_offsets(offsets)
            if offsets[-1] > length:
                raise ArgumentValueError("cu_seqlens", f"offsets up to T = {length}", f"last offset {offsets[-1]}")
    n = batch if cu is None else cu.shape[0] - 1
    if max_seqlen is not None:
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
            raise ArgumentTypeError("max_seqlen", "an int", type(max_seqlen).__name__)
        if not 0 <= max_seqlen <= max(length, 0):
            raise ArgumentValueError("max_seqlen", f"0 <= max_seqlen <= T = {length}", str(max_seqlen))

    # state
    state_shape = (value_heads, key_dim, value_dim) if state_layout == "kv" else (value_heads, value_dim, key_dim)
    axes = "[slots, HV, K, V]" if state_layout == "kv" else "[slots, HV, V, K]"
    read: torch.Tensor | None = None
    write: torch.Tensor | None = None
    pool = initial_state_source
    if pool is None:
        for name, value in (
            ("initial_state_indices", initial_state_indices),
            ("output_state_indices", output_state_indices),
        ):
            if value is not None:
                raise ArgumentValueError(name, "None without initial_state_source", "a tensor")
    else:
        _float_tensor("initial_state_source", pool)
        if pool.dim() != 4 or tuple(pool.shape[1:]) != state_shape:
            raise ArgumentValueError(
                "initial_state_source",
                f"shape {axes} = [slots, {', '.join(map(str, state_shape))}]",
                _shape(pool),
            )
        _same_device("initial_state_source", pool, device)
        _no_overlap("initial_state_source", pool)
        if initial_state_indices is None:
            raise ArgumentValueError(
                "initial_state_indices", f"[N] = [{n}] slot numbers with initial_state_source", "None"
            )
        read = _slots("initial_state_indices", initial_state_indices, n, device)
        if disable_state_update:
            if output_state_indices is not None:
                raise ArgumentValueError("output_state_indices", "None with disable_state_update=True", "a tensor")
        elif output_state_indices is None:
            write = read
        else:
            write = _slots("output_state_indices", output_state_indices, n, device)
            if write.dtype != read.dtype:
                raise ArgumentTypeError(
                    "output_state_indices", f"initial_state_indices' dtype {read.dtype}", str(write.dtype)
                )
            if write is read:
                write = read.view_as(read)  # equal slots, yet written as separate ones: same result

    # verification
    rows: torch.Tensor | None = None
    if intermediate_states_buffer is None:
        for name, value in (
            ("intermediate_state_indices", intermediate_state_indices),
            ("retrieve_parent_token", retrieve_parent_token),
        ):
            if value is not None:
                raise ArgumentValueError(name, "None without intermediate_states_buffer", "a tensor")
    else:
        buffer = intermediate_states_buffer
        _float_tensor("intermediate_states_buffer", buffer)
        if buffer.dim() != 5 or tuple(buffer.shape[2:]) != state_shape:
            raise ArgumentValueError(
                "intermediate_states_buffer",
                f"shape [rows, steps, {', '.join(map(str, state_shape))}] (state_layout {state_layout!r})",
                _shape(buffer),
            )
        _same_device("intermediate_states_buffer", buffer, device)
        _no_overlap("intermediate_states_buffer", buffer)
        if intermediate_state_indices is None:
            raise ArgumentValueError(
                "intermediate_state_indices",
                f"[N] = [{n}] row numbers with intermediate_states_buffer",
                "None",
            )
        rows = _slots("intermediate_state_indices", intermediate_state_indices, n, device)
        longest = _longest(layout, cu, length, max_seqlen)
        if longest is not None and longest > buffer.shape[1]:
            raise ArgumentValueError(
                "intermediate_states_buffer",
                f"at least {longest} steps (longest sequence)",
                f"{buffer.shape[1]} steps",
            )
        if retrieve_parent_token is not None:
            _index_tensor("retrieve_parent_token", retrieve_parent_token)
            _same_device("retrieve_parent_token", retrieve_parent_token, device)
            if not retrieve_parent_token.is_contiguous():
                strides = f"strides {retrieve_parent_token.stride()}"
                raise ArgumentValueError("retrieve_parent_token", "a contiguous tensor", strides)
            parents_shape = tuple(retrieve_parent_token.shape)
            if len(parents_shape) != 2 or parents_shape[0] != n or (longest is not None and parents_shape[1] < longest):
                raise ArgumentValueError(
                    "retrieve_parent_token",
                    f"shape [N, steps] = [{n}, >= {longest if longest is not None else 'longest length'}]",
                    _shape(retrieve_parent_token),
                )

    if device.type == "cpu":
        check_host_indices(pool, read, write, intermediate_states_buffer, rows)

    # output
    if out is not None:
        _float_tensor("out", out)
        _expect_shape("out", out, (batch, length, value_heads, value_dim), "v's shape [B, T, HV, V]")
        if out.dtype != q.dtype:
            raise ArgumentTypeError("out", f"q's dtype {q.dtype}", str(out.dtype))
        _same_device("out", out, device)
        _no_overlap("out", out)

    call = Call(
        A_log=A_log,
        a=a,
        dt_bias=dt_bias,
        softplus_beta=beta,
        softplus_threshold=threshold,
        q=q,
        k=k,
        v=v,
        b=b,
        scale=scale_value,
        use_qk_l2norm=use_qk_l2norm_in_kernel,
        pool=pool,
        read_slots=read,
        write_slots=write,
        state_layout=state_layout,  # type: ignore[arg-type]
        cu_seqlens=cu,
        layout=layout,
        max_seqlen=max_seqlen,
        is_kda=is_kda,
        lower_bound=lower_bound,
        allow_neg_eigval=allow_neg_eigval,
        intermediates=intermediate_states_buffer,
        intermediate_rows=rows,
        parents=retrieve_parent_token,
        out=out,
    )
    _check_grad(call)
    return call


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)}"


def _expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], words: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ArgumentValueError(name, f"{words} = {list(shape)}", _shape(tensor))


def _strided_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(name, "a tensor", type(value).__name__)
    if value.layout is not torch.strided:
        raise ArgumentTypeError(name, "a dense (strided) tensor", str(value.layout))


def _float_tensor(name: str, value: Any) -> None:
    _strided_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(name, "dtype bfloat16, float16, float32 or float64", str(value.dtype))


def _index_tensor(name: str, value: Any) -> None:
    _strided_tensor(name, value)
    if value.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(name, "dtype int32 or int64", str(value.dtype))


def _slots(name: str, value: Any, n: int, device: torch.device) -> torch.Tensor:
    _index_tensor(name, value)
    tensor: torch.Tensor = value
    _expect_shape(name, tensor, (n,), "[N]")
    _same_device(name, tensor, device)
    if n > 1 and tensor.stride(0) != 1:
        raise ArgumentValueError(name, "a contiguous tensor", f"stride {tensor.stride(0)}")
    return tensor


def _same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ArgumentValueError(name, f"q's device {device}", f"device {tensor.device}")


def as_gate(name: str, tensor: torch.Tensor, batch: int, length: int, tail: tuple[int, ...]) -> torch.Tensor:
    """``[B, T, *tail]``, or without B when B = 1, or with ``tail`` flattened (KDA's [.., HV * K])."""
    flat = math.prod(tail)
    leads = [(batch, length)] + ([(length,)] if batch == 1 else [])
    for lead in leads:
        if tuple(tensor.shape) == (*lead, *tail):
            return tensor if len(lead) == 2 else tensor.unsqueeze(0)
        if len(tail) > 1 and tuple(tensor.shape) == (*lead, flat):
            tensor = tensor.unflatten(-1, tail)  # type: ignore[no-untyped-call]
            return tensor if len(lead) == 2 else tensor.unsqueeze(0)
    words = "[B, T, HV, K]" if len(tail) > 1 else "[B, T, HV]"
    raise ArgumentValueError(name, f"{words} = {[batch, length, *tail]}", _shape(tensor))


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(name, "True or False", repr(value))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(name, "a number", type(value).__name__)
    if not -_LARGEST <= value <= _LARGEST:  # false for NaN too
        raise ArgumentValueError(name, "a finite number, in float32 too", _shown(value))
    return float(value)


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number < _SMALLEST:
        raise ArgumentValueError(name, "a finite number > 0, not vanishing in float32", _shown(value))
    return number


def _shown(value: float) -> str:
    return str(value) if isinstance(value, float) else f"{str(value)[:20]} ({len(str(value))} digits)"


def _no_overlap(name: str, tensor: torch.Tensor) -> None:
    """A written tensor must not name one address twice."""
    if overlaps_itself(tensor):
        raise ArgumentValueError(name, "a tensor that owns each of its elements", f"stride {tensor.stride()}")


def _longest(layout: SequenceLayout | None, cu: torch.Tensor | None, length: int, hint: int | None) -> int | None:
    if cu is None:
        return length
    if layout is not None:
        return layout.longest
    if not cu.is_cuda:
        return int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    return hint


def _check_grad(call: Call) -> None:
    if not call.requires_grad():
        return
    for name in ("out", "intermediates"):
        if getattr(call, name) is not None:
            argument = "out" if name == "out" else "intermediate_states_buffer"
            raise ArgumentValueError(argument, "None when inputs require grad", "a tensor")
    if call.pool is not None and call.pool.requires_grad and call.update != "disabled":
        raise ArgumentValueError(
            "initial_state_source",
            "a pool that does not require grad, or disable_state_update=True (it is updated in place)",
            "requires_grad=True",
        )
