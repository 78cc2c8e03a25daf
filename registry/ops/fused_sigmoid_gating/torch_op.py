"""The op as torch operators: what ``torch.compile``, ``torch.export`` and dispatch modes see of it.

The operators are opaque: traced by their schemas and fake kernels, executed by the op itself, which still chooses the
backend at every call. Mutation is declared: the pool, the intermediate states, ``out``. A call that requires gradients
and writes to none of its arguments is differentiable; one that does both raises. Decode and prompt steps, whose time on
the host counts, have an operator of few arguments (``torch_step``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import is_grad_enabled

from ....errors import ArgumentValueError, BackendDeclinedError
from ...decision import RejectCode
from ...varlen.graph_layout import GraphLayout
from ...varlen.layout import SequenceLayout
from .torch_schema import BACKWARD, IN_PLACE, OUT, READ_ONLY, STEP
from .torch_served import NAME, SERVING, any_requires_grad, process_wide_call, refuse_grad, served, serving
from .torch_settings import settings_of
from .torch_step import fake_step, step

__all__ = ["OPERATORS", "is_traced", "serving", "traced"]

#: Names of the operators under ``torch.ops.isokern`` that users' graphs contain.
OPERATORS = (
    "fused_sigmoid_gating_step",
    "fused_sigmoid_gating",
    "fused_sigmoid_gating.out",
    "fused_sigmoid_gating_read_only",
)

#: Where the general operators take what gradients flow to, ``torch_served.LEAVES``.
_PLACES = (0, 1, 2, 5, 6, 7, 8, 9)


def is_traced(values: Iterable[object]) -> bool:
    """Whether a call with these arguments must be seen as an operator: some mode or transform is watching (make_fx,
    AOT autograd, FLOP counters, vmap), or a tensor stands for something else (fake, functional).
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return True
    plain = torch.Tensor.__torch_dispatch__
    return any(isinstance(t, torch.Tensor) and type(t).__torch_dispatch__ is not plain for t in values)


def traced(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor | None,
    initial_state_indices: torch.Tensor | None,
    scale: float | None,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor | SequenceLayout | GraphLayout | None,
    *,
    state_layout: str = "kv",
    is_kda: bool = False,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    disable_state_update: bool,
    intermediate_states_buffer: torch.Tensor | None,
    intermediate_state_indices: torch.Tensor | None,
    retrieve_parent_token: torch.Tensor | None,
    output_state_indices: torch.Tensor | None,
    out: torch.Tensor | None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The call as one operator of ``torch.ops.isokern``. A layout goes in as its tensor: graphs outlive batches."""
    if isinstance(cu_seqlens, SequenceLayout | GraphLayout):
        cu_seqlens = cu_seqlens.cu_seqlens
    unusual = (intermediate_state_indices, retrieve_parent_token, output_state_indices)
    if (
        initial_state_source is not None
        and not disable_state_update
        and initial_state_indices is not None
        and intermediate_states_buffer is None
        and unusual == (None, None, None)
        and out is None
    ):
        settings = settings_of(
            softplus_beta, softplus_threshold, scale, use_qk_l2norm_in_kernel, state_layout, is_kda, lower_bound,
            allow_neg_eigval, max_seqlen, backend,
        )  # fmt: skip
        if settings is not None:
            stepped: torch.Tensor = torch.ops.isokern.fused_sigmoid_gating_step.default(
                A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices, cu_seqlens, settings
            )
            return stepped
    shared = (
        A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices,
        scale, use_qk_l2norm_in_kernel, cu_seqlens,
    )  # fmt: skip
    reads_only = (initial_state_source is None or disable_state_update) and intermediate_states_buffer is None
    if reads_only and out is None and unusual == (None, None, None):
        result: torch.Tensor = torch.ops.isokern.fused_sigmoid_gating_read_only.default(
            *shared, state_layout=state_layout, is_kda=is_kda, lower_bound=lower_bound,
            allow_neg_eigval=allow_neg_eigval, max_seqlen=max_seqlen, backend=backend,
        )  # fmt: skip
        return result
    # As the operators take them: by position, since keyword arguments are converted one by one; and no further than
    # needed, since so are the others.
    options = (
        state_layout, is_kda, lower_bound, allow_neg_eigval, disable_state_update, intermediate_states_buffer,
        *unusual, max_seqlen, backend,
    )  # fmt: skip
    needed = len(options)
    while needed > 1 and (options[needed - 1] is None or options[needed - 1] is False):
        needed -= 1
    every = (*shared, *options[:needed])
    if out is not None:
        torch.ops.isokern.fused_sigmoid_gating.out(*every, out=out)
        return out
    made: torch.Tensor = torch.ops.isokern.fused_sigmoid_gating.default(*every)
    return made


# ---- kernels


def _in_place(
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
    cu_seqlens: torch.Tensor | None = None,
    state_layout: str = "kv",
    is_kda: bool = False,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    output_state_indices: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator that writes to its arguments. Spelled out: Python takes a dictionary to call by many names."""
    if is_grad_enabled() and any_requires_grad(A_log, a, dt_bias, q, k, v, b, initial_state_source):
        refuse_grad(A_log, a, dt_bias, q, k, v, b, initial_state_source)
    op = SERVING.get()
    call = process_wide_call() if op is None else op.__call__
    if (
        intermediate_states_buffer is None
        and intermediate_state_indices is None
        and retrieve_parent_token is None
        and output_state_indices is None
    ):
        made: torch.Tensor = call(
            A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source,
            initial_state_indices, scale, use_qk_l2norm_in_kernel, cu_seqlens, state_layout=state_layout,
            is_kda=is_kda, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval,
            disable_state_update=disable_state_update, out=out, max_seqlen=max_seqlen, backend=backend,
        )  # fmt: skip
        return made
    result: torch.Tensor = call(
        A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source,
        initial_state_indices, scale, use_qk_l2norm_in_kernel, cu_seqlens, state_layout=state_layout, is_kda=is_kda,
        lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval, disable_state_update=disable_state_update,
        intermediate_states_buffer=intermediate_states_buffer, intermediate_state_indices=intermediate_state_indices,
        retrieve_parent_token=retrieve_parent_token, output_state_indices=output_state_indices, out=out,
        max_seqlen=max_seqlen, backend=backend,
    )  # fmt: skip
    return result


def _out(*args: Any, out: torch.Tensor) -> None:
    _in_place(*args, out=out)


def _read_only(*args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = served()(*args, disable_state_update=_pool(args) is not None, **kwargs)
    return result


def _pool(args: tuple[Any, ...]) -> torch.Tensor | None:
    """The pool among positional arguments, of which trailing defaults may be missing."""
    pool: torch.Tensor | None = args[9] if len(args) > 9 else None
    return pool


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    return [args[place] for place in _PLACES if place < len(args)]


def _backward(grad: torch.Tensor, pool_grad: bool, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Gradients of A_log, a, dt_bias, q, k, v, b and the pool (empty unless asked for), by running the call again on a
    differentiable backend.
    """
    places = _PLACES[: None if pool_grad else -1]
    # The dispatcher has switched autograd off for what runs inside an operator's kernel.
    with _autograd_on(), torch.enable_grad():
        again = list(args)
        for i in places:
            again[i] = args[i].detach().requires_grad_()
        o = served()(*again, disable_state_update=_pool(args) is not None, **kwargs)
        found = torch.autograd.grad(o, [again[i] for i in places], grad, allow_unused=True)
    # Of their own, and packed: as the fake kernel says.
    grads = [
        torch.zeros_like(args[i], memory_format=torch.contiguous_format)
        if g is None
        else g.to(args[i].dtype).clone(memory_format=torch.contiguous_format)
        for i, g in zip(places, found, strict=True)
    ]
    return grads if pool_grad else [*grads, grad.new_empty(0)]


@contextmanager
def _autograd_on() -> Iterator[None]:
    keys = torch._C.DispatchKey
    guard = torch._C._SetExcludeDispatchKeyGuard
    autograd = (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView)
    with guard(autograd[0], False), guard(autograd[1], False), guard(autograd[2], False):
        yield


# ---- what tracing sees


def _fake_output(*args: Any, **kwargs: Any) -> torch.Tensor:
    q, v = args[5], args[7]
    return torch.empty(v.shape, dtype=q.dtype, device=q.device)


def _fake_in_place(*args: Any, **kwargs: Any) -> torch.Tensor:
    refuse_grad(*_leaves(args))
    return _fake_output(*args)


def _fake_out(*args: Any, **kwargs: Any) -> None:
    refuse_grad(*_leaves(args))


def _fake_backward(grad: torch.Tensor, pool_grad: bool, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    tensors = [args[place] for place in _PLACES[: None if pool_grad else -1]]
    made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]
    return made if pool_grad else [*made, grad.new_empty(0)]


# ---- autograd of the read-only operator


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _refuse_backend(keyword_only_inputs.get("backend"))
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.inputs = tuple(None if isinstance(x, torch.Tensor) else x for x in inputs)
    ctx.is_tensor = tuple(isinstance(x, torch.Tensor) for x in inputs)
    ctx.options = keyword_only_inputs


def _refuse_backend(name: str | None) -> None:
    """Raise for a backend that was asked for by name and has no gradients, as the op itself does."""
    dispatcher = served().dispatcher
    forced = dispatcher.request(name)
    name = forced.argument or forced.context or forced.environment
    if name is not None and "differentiable" not in dispatcher.registry.backends(NAME)[name].tags:
        raise BackendDeclinedError(NAME, name, RejectCode.GRAD, "not differentiable")


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.inputs, strict=True)]
    pool_grad = len(inputs) > 9 and ctx.needs_input_grad[9]
    found = torch.ops.isokern.fused_sigmoid_gating_backward(grad, pool_grad, *inputs, **ctx.options)
    grads: list[torch.Tensor | None] = [None] * len(inputs)
    for i, g in zip(_PLACES, found, strict=True):
        if i < len(inputs) and ctx.needs_input_grad[i]:
            grads[i] = g
    return tuple(grads)


def _no_second(ctx: Any, *grads: Any) -> None:
    raise ArgumentValueError("grad", "first derivatives", "a second derivative", "call the op eagerly for those")


def _define() -> torch.library.Library:
    library = torch.library.Library("isokern", "FRAGMENT")  # type: ignore[no-untyped-call]
    operators: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
        (STEP, step, fake_step),
        (IN_PLACE, _in_place, _fake_in_place),
        (OUT, _out, _fake_out),
        (READ_ONLY, _read_only, _fake_output),
        (BACKWARD, _backward, _fake_backward),
    )
    for schema, kernel, fake in operators:
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        library.define(schema, tags=tags)  # type: ignore[no-untyped-call]
        name = schema.partition("(")[0]
        library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"isokern::{name}", fake, lib=library)
    torch.library.register_autograd(
        "isokern::fused_sigmoid_gating_read_only", _gradients, setup_context=_setup_context, lib=library
    )
    torch.library.register_autograd("isokern::fused_sigmoid_gating_backward", _no_second, lib=library)
    return library


#: Holds the definitions: they go when it does.
_LIBRARY = _define()
