"""The hot path: a call like an earlier one costs its recognition, its output and the bound runner, nothing else.

A call is recognised by comparing what the host knows of it with the entries that served last, then with those for the
same shapes: flags and names by identity, numbers by type and value, tensors by one guard (``guards``). What is not
recognised goes through ``_first``, which validates, decides, binds and leaves an entry. Contents of device tensors are
free; offsets that the host holds are compared, because they were checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from ....errors import BackendFailedError, IsokernError, RegistrationError
from ...dispatch import Dispatcher
from ...overrides import NO_OVERRIDES, current_overrides
from ...varlen.graph_layout import GraphLayout
from ...varlen.layout import SequenceLayout
from .call import Call
from .entries import Entries
from .entry import Entry
from .first import FirstCalls
from .guards import is_current_stream_capturing
from .host_indices import check_host_indices
from .torch_op import traced

__all__ = ["HotPath"]

_NAME = "fused_sigmoid_gating"


class HotPath:
    """The op's ``__call__``, in front of everything else the op does.

    Attributes:
        entries: the kinds of calls it knows; ``torch_step`` looks through them, too.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        from ... import default

        # Operators are the process's; they would not find an op of another registry again.
        self._has_operators = dispatcher.registry is default
        self.entries = Entries(dispatcher)
        self._first = FirstCalls(dispatcher, self.entries, self._has_operators)

    def __call__(
        self,
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
        backend: str | None = None,
        validate: str = "fast",
    ) -> torch.Tensor:
        """Run the op on the fastest valid backend.

        Per sequence and value head, with state S ``[K, V]``, for each token::

            x = a + dt_bias;  g = -exp(A_log) * softplus(x; softplus_beta, softplus_threshold);  beta = sigmoid(b)
            if use_qk_l2norm_in_kernel: q, k = q / sqrt(sum(q * q) + 1e-6), k / sqrt(sum(k * k) + 1e-6)
            q = q * scale
            S = exp(g) * S;  u = beta * (v - S^T k);  S = S + k u^T;  o = S^T q

        Args:
            A_log: ``[HV]``; a: ``[B, T, HV]`` or ``[T, HV]`` (B = 1), with a last axis K for KDA (or ``HV * K``
                flattened); dt_bias: ``[HV]``, for KDA ``[HV, K]`` or ``[HV * K]``.
            softplus_beta, softplus_threshold: softplus is ``log1p(exp(beta * x)) / beta``, and x beyond the
                threshold on ``beta * x``.
            q, k: ``[B, T, H, K]``; v: ``[B, T, HV, V]``; b: as a for GDN. HV is a multiple of H; value head i
                uses q/k head ``i // (HV // H)``. bfloat16, float16 or float32, strided views welcome.
            initial_state_source: the pool, ``[slots, HV, K, V]`` (or ``V, K``: ``state_layout``), any slot stride,
                float32, bfloat16 or float16; read, and updated in place. None: zero start, nothing kept.
            initial_state_indices: ``[N]`` int32/int64 slots; negative: zero start and nothing stored.
            scale: default ``K ** -0.5``.
            cu_seqlens: ``[N + 1]`` offsets of N packed sequences (B = 1), or their SequenceLayout or GraphLayout;
                None: N = B sequences of T tokens. Rows beyond the last offset are neither read nor written.
            state_layout: ``"kv"`` or ``"vk"``: the order of the pool's last two axes.
            is_kda, lower_bound: gates per key channel; ``g = lower_bound * sigmoid(exp(A_log) * x)``.
            allow_neg_eigval: ``beta = 2 * sigmoid(b)``.
            disable_state_update: read the pool, write nothing to it.
            intermediate_states_buffer, intermediate_state_indices: ``[rows, steps, HV, K, V]`` and ``[N]``: the
                state after step t of sequence n goes to ``buffer[indices[n], t]`` (nothing for a negative row).
            retrieve_parent_token: ``[N, steps]``: step t starts from the stored state of this earlier step
                (negative: from the sequence's start), for verifying a token tree.
            output_state_indices: ``[N]`` slots to write instead of those read; negative: nothing stored.
            out: ``[B, T, HV, V]`` in q's dtype to write into; max_seqlen: longest length, if the host knows it.
            backend: name of the backend to use, or the call raises. validate: ``"full"`` also checks values on
                the device (and waits for it).

        Returns:
            ``[B, T, HV, V]`` in q's dtype (``out`` if given).

        Raises:
            ArgumentValueError, ArgumentTypeError: naming the argument; nothing has been written.
            UnknownNameError, BackendDeclinedError, NoBackendError: no backend to run on.
            BackendFailedError: the backend failed to compile or to run.
            NotPreparedError: inside a CUDA graph capture, something would have to be compiled.
            ForkedProcessError: in a process forked from one that used the op.
        """
        if is_dynamo_compiling():
            if not self._has_operators:
                raise RegistrationError("torch.compile traces ops of the process-wide registry only")
            return traced(
                A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source,
                initial_state_indices, scale, use_qk_l2norm_in_kernel, cu_seqlens, state_layout=state_layout,
                is_kda=is_kda, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval,
                disable_state_update=disable_state_update, intermediate_states_buffer=intermediate_states_buffer,
                intermediate_state_indices=intermediate_state_indices, retrieve_parent_token=retrieve_parent_token,
                output_state_indices=output_state_indices, out=out, max_seqlen=max_seqlen, backend=backend,
            )  # fmt: skip
        layout: SequenceLayout | None = None
        cu: Any = cu_seqlens
        if cu is not None and type(cu) is not Tensor:
            if isinstance(cu, SequenceLayout):
                layout, cu = cu, cu.cu_seqlens
            elif isinstance(cu, GraphLayout):
                if not _has_room(q, cu):
                    return self._first({**locals(), "tensors": ()})  # which refuses it
                max_seqlen = cu.max_length if max_seqlen is None else max_seqlen
                cu = cu.cu_seqlens
        # A step updates a pool in place and has nothing unusual. Its tensors are handed to the guard one by one: no
        # tuple of all of them and none of those given, 0.2 us; and what it does not have is looked at once, not for
        # each entry.
        is_step = (
            out is None
            and output_state_indices is None
            and initial_state_source is not None
            and disable_state_update is False
            and intermediate_states_buffer is None
            and intermediate_state_indices is None
            and retrieve_parent_token is None
        )
        write = output_state_indices
        if write is None and not disable_state_update:
            write = initial_state_indices
        tensors: tuple[Any, ...] = ()
        if not is_step:
            tensors = (
                A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices, write, cu,
                intermediate_states_buffer, intermediate_state_indices, retrieve_parent_token, out,
            )  # fmt: skip
        overrides = current_overrides()
        forced = None if overrides is NO_OVERRIDES else overrides.get(_NAME)
        entries = self.entries
        candidates, alike = entries.recent, False
        while validate == "fast":
            for entry in candidates:
                # Flags are one of two objects, and 1 is not True; numbers and names are mostly the same object, call
                # after call, else they must agree in type and in value (types first: what tensors compare to waits).
                if (
                    use_qk_l2norm_in_kernel is not entry.l2norm
                    or is_kda is not entry.is_kda
                    or allow_neg_eigval is not entry.neg_eigval
                    or is_step is not entry.is_step
                    or (
                        softplus_beta is not (known := entry.softplus_beta)
                        and (type(softplus_beta) is not type(known) or softplus_beta != known)
                    )
                    or (
                        softplus_threshold is not (known := entry.threshold)
                        and (type(softplus_threshold) is not type(known) or softplus_threshold != known)
                    )
                    or (scale is not (known := entry.scale) and (type(scale) is not type(known) or scale != known))
                    or (
                        lower_bound is not (known := entry.lower_bound)
                        and (type(lower_bound) is not type(known) or lower_bound != known)
                    )
                    or (
                        max_seqlen is not (known := entry.max_seqlen)
                        and (type(max_seqlen) is not type(known) or max_seqlen != known)
                    )
                    or (
                        state_layout is not (known := entry.state_layout)
                        and (type(state_layout) is not type(known) or state_layout != known)
                    )
                    or (
                        backend is not (known := entry.backend)
                        and (type(backend) is not type(known) or backend != known)
                    )
                    or (forced is not entry.forced and forced != entry.forced)
                    # What the entry lacks must be absent; that the rest is there, the guard sees.
                    or (cu is not None and not entry.has_cu)
                    or (
                        not (
                            entry.guard(A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices, cu)
                            if entry.has_cu
                            else entry.guard(A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices)
                        )
                        if is_step
                        else (
                            disable_state_update is not entry.disabled
                            or (out is not None and not entry.has_out)
                            or (initial_state_source is not None and not entry.has_pool)
                            or (initial_state_indices is not None and not entry.has_pool)
                            or (output_state_indices is None) is entry.separate
                            or (entry.separate and output_state_indices is initial_state_indices)
                            or (intermediate_states_buffer is not None and not entry.has_steps)
                            or (intermediate_state_indices is not None and not entry.has_steps)
                            or (retrieve_parent_token is not None and not entry.has_parents)
                            or not entry.guard(*entry.present(tensors))
                        )
                    )
                    or (entry.grad is not None and entry.grad is not is_grad_enabled())
                    or (entry.on_cuda and is_current_stream_capturing() is not entry.capturing)
                ):
                    continue
                if layout is None:
                    if entry.identity is not None:
                        continue
                    if entry.host_lengths:
                        offsets = cu.tolist()
                        if offsets != entry.offsets and not entry.takes_offsets(offsets):
                            continue
                elif layout.identity is not entry.identity and not entry.takes_layout(layout):
                    continue

                if entry.on_host:
                    check_host_indices(
                        initial_state_source, initial_state_indices, write, intermediate_states_buffer,
                        intermediate_state_indices,
                    )  # fmt: skip
                number = entries.hit()
                if entry is not candidates[0] or alike:
                    entries.served(entry, number)
                if entry.reshape is not None:
                    a, b, dt_bias = entry.reshape(a, b, dt_bias)
                    tensors = ()
                if out is None and entry.new_output is not None:
                    out = entry.new_output(v)
                    tensors = ()
                if not tensors:
                    tensors = (
                        A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices, write, cu,
                        intermediate_states_buffer, intermediate_state_indices, retrieve_parent_token, out,
                    )  # fmt: skip
                try:
                    if entry.pinned is not None:
                        entry.pinned(tensors)
                        return out  # type: ignore[return-value]  # a pinned call has an output
                    if entry.laid is not None:
                        entry.laid(tensors, layout)  # without a layout no call got this far
                        return out  # type: ignore[return-value]
                    beta, threshold, scale, lower_bound = entry.numbers
                    call = Call(
                        A_log, a, dt_bias, beta, threshold, q, k, v, b, scale, use_qk_l2norm_in_kernel,
                        initial_state_source, initial_state_indices, write, entry.state_layout, cu, layout, max_seqlen,
                        is_kda, lower_bound, allow_neg_eigval, intermediate_states_buffer, intermediate_state_indices,
                        retrieve_parent_token, out,
                    )  # fmt: skip
                    if entry.host_lengths:
                        call.__dict__["offsets"] = tuple(offsets)
                    result: torch.Tensor = entry.runner(call)
                except IsokernError:
                    raise
                except Exception as error:
                    raise self.failed(entry, error) from error
                return result
            if alike:
                break
            candidates, alike = entries.alike(q, v), True
        if is_step:
            tensors = (
                A_log, a, dt_bias, q, k, v, b, initial_state_source, initial_state_indices, write, cu, None, None, None,
                None,
            )  # fmt: skip
        return self._first(locals())

    def failed(self, entry: Entry, error: Exception) -> BackendFailedError:
        """The typed error for an entry's runner that raised."""
        return self._first.failed(entry.decision, entry.problem, error)


def _has_room(q: Any, layout: GraphLayout) -> bool:
    """Whether all tokens that a layout may come to hold are there: its offsets change where nobody looks."""
    return layout.max_tokens is None or (isinstance(q, Tensor) and q.dim() > 1 and layout.max_tokens <= q.shape[1])
