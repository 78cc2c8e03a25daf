"""The callable users get from ``registry.get("fused_sigmoid_gating")``."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ....errors import ArgumentValueError, IsokernError
from ... import overrides
from ...backend import Config
from ...decision import Decision
from ...dispatch import Bound, Dispatcher
from ...explain import render
from ...varlen.layout import SequenceLayout, check_offsets
from .call import Call
from .validate import as_gate, canonical_call
from .validate_values import check_values

__all__ = ["FusedSigmoidGating"]

_NEVER = object()


def _meta(t: torch.Tensor) -> tuple[Any, ...]:
    """What a validated call's tensor must keep to make the next call valid as well."""
    return (t.shape, t.stride(), t.dtype, t.device)


def _meta_or_none(t: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


class FusedSigmoidGating:
    """The fused sigmoid-gated delta rule: gates, L2 norm, recurrence and state pool in one call.

    See :meth:`__call__` for the contract. The same object serves every shape; the backend is chosen per call.
    """

    name = "fused_sigmoid_gating"

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

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
        cu_seqlens: torch.Tensor | SequenceLayout | None = None,
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
            cu_seqlens: ``[N + 1]`` offsets of N packed sequences (B = 1), or their SequenceLayout; None: N = B
                sequences of T tokens. Rows beyond the last offset are neither read nor written.
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
        """
        layout: SequenceLayout | None = None
        cu: torch.Tensor | None = None
        offsets: tuple[int, ...] | None = None
        lengths: Hashable = None
        given: object = cu_seqlens  # callers pass what they like
        if given is not None:
            if isinstance(given, SequenceLayout):
                layout, cu = given, given.cu_seqlens
                lengths = (layout.n, layout.tokens, layout.longest)
            elif isinstance(given, torch.Tensor):
                cu = given
                if not cu.is_cuda and cu.dim() == 1 and cu.device.type == "cpu":
                    offsets = tuple(cu.tolist())
                    check_offsets(offsets)
                    longest = max((offsets[i + 1] - offsets[i] for i in range(len(offsets) - 1)), default=0)
                    lengths = (len(offsets) - 1, offsets[-1], longest)
            else:
                lengths = _NEVER  # no tensor: the slow path names it
        try:
            key: Hashable = (
                *(_meta(t) for t in (A_log, a, dt_bias, q, k, v, b)),
                _meta_or_none(initial_state_source),
                _meta_or_none(initial_state_indices),
                _meta_or_none(cu),
                lengths,
                softplus_beta,
                softplus_threshold,
                scale,
                (use_qk_l2norm_in_kernel, is_kda, allow_neg_eigval, disable_state_update),
                (state_layout, lower_bound, max_seqlen, backend),
                # 1 == True == 1.0 to a dict, not to the contract
                *map(type, (use_qk_l2norm_in_kernel, is_kda, allow_neg_eigval, disable_state_update)),
                *map(type, (softplus_beta, softplus_threshold, scale, lower_bound, max_seqlen)),
                _meta_or_none(intermediate_states_buffer),
                _meta_or_none(intermediate_state_indices),
                _meta_or_none(retrieve_parent_token),
                _meta_or_none(output_state_indices),
                output_state_indices is None or output_state_indices is initial_state_indices,
                _meta_or_none(out),
                overrides.active(self.name),
                _grad(A_log, a, dt_bias, q, k, v, b),
                _grad(initial_state_source, out, intermediate_states_buffer),
                q.is_cuda and torch.cuda.is_current_stream_capturing(),
            )
            known = validate == "fast" and lengths is not _NEVER
            bound = self._dispatcher.bound.get(key) if known else None
        except (AttributeError, TypeError):
            bound, key = None, None  # some argument is no tensor: the slow path names it
        if bound is None:
            call = self._canonical(locals(), validate)
            bound = self._resolve(key, call, backend)
        else:
            batch, length, heads, key_dim = q.shape
            value_heads = v.shape[2]
            gate = (value_heads, key_dim) if is_kda else (value_heads,)
            write = None
            if initial_state_source is not None and not disable_state_update:
                write = initial_state_indices if output_state_indices is None else output_state_indices
            call = Call(
                A_log,
                as_gate("a", a, batch, length, gate),
                dt_bias.unflatten(0, gate) if is_kda and dt_bias.dim() == 1 else dt_bias,  # type: ignore[no-untyped-call]
                softplus_beta,
                softplus_threshold,
                q,
                k,
                v,
                as_gate("b", b, batch, length, (value_heads,)),
                key_dim**-0.5 if scale is None else scale,
                use_qk_l2norm_in_kernel,
                initial_state_source,
                initial_state_indices,
                write,
                state_layout,  # type: ignore[arg-type]
                cu,
                layout,
                max_seqlen,
                is_kda,
                lower_bound,
                allow_neg_eigval,
                intermediate_states_buffer,
                intermediate_state_indices,
                retrieve_parent_token,
                out,
            )
        if offsets is not None:
            call.__dict__["offsets"] = offsets
        return self._run(bound, call)

    def _canonical(self, arguments: dict[str, Any], validate: str) -> Call:
        if validate not in ("fast", "full"):
            raise ArgumentValueError("validate", "'fast' or 'full'", repr(validate))
        call = canonical_call(**{name: arguments[name] for name in _ARGUMENTS})
        if validate == "full":
            check_values(call)
        return call

    def _resolve(self, key: Hashable, call: Call, backend: str | None) -> Bound:
        return self._dispatcher.resolve(key, call, backend)

    def _run(self, bound: Bound, call: Call) -> torch.Tensor:
        if call.out is None and not call.requires_grad():
            call.out = self._dispatcher.spec.allocate(call)
        if call.n == 0 or call.tokens == 0:
            return self._dispatcher.spec.allocate(call) if call.out is None else call.out
        try:
            result: torch.Tensor = bound.runner(call)
        except IsokernError:
            raise
        except Exception as error:
            decision = bound.decision
            config = Config.from_dict(decision.config)
            problem = self._dispatcher.spec.problem(call, None)
            raise self._dispatcher.failure("run", decision.backend, config, problem, error) from error
        return result

    def decide(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
        """The decision a call with these arguments leads to. Runs and writes nothing."""
        kwargs.pop("validate", None)
        call = canonical_call(*args, **kwargs)
        return self._dispatcher.decide(self._dispatcher.spec.problem(call, None), backend)

    def explain(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
        """Print the decision for these arguments: the choice, the rule, each backend's verdict; and return it."""
        decision = self.decide(*args, backend=backend, **kwargs)
        print(render(decision))
        return decision

    def prepare(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Decision:
        """Compile ahead whatever a call with these arguments would run; returns the decision."""
        kwargs.pop("validate", None)
        call = canonical_call(*args, **kwargs)
        problem = self._dispatcher.spec.problem(call, None)
        decision = self._dispatcher.decide(problem, backend)
        self._dispatcher.bind(problem, decision.backend, decision.config)
        return decision

    def __repr__(self) -> str:
        names = ", ".join(self._dispatcher.registry.backends(self.name))
        return f"<op {self.name}: {names}>"


_ARGUMENTS = (
    "A_log a dt_bias softplus_beta softplus_threshold q k v b initial_state_source initial_state_indices scale "
    "use_qk_l2norm_in_kernel cu_seqlens state_layout is_kda lower_bound allow_neg_eigval disable_state_update "
    "intermediate_states_buffer intermediate_state_indices retrieve_parent_token output_state_indices out max_seqlen"
).split()


def _grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
