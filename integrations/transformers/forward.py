"""The forward of a linear-attention layer with the op in place of gates, normalisation and delta rule.

The layer of transformers makes ``g`` and ``beta`` and hands them to one of two functions; from those the op's inputs
cannot be had back exactly, and fusing them is what the op is for. So what is replaced is the layer's forward, on the
instance: projections, convolution, norms and the cache's bookkeeping stay transformers' own functions and modules.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from ... import registry
from ...errors import IntegrationError
from ..slots import slots
from .families import Family
from .packed import Layouts, packed_conv, packed_offsets
from .states import LayerStates

__all__ = ["LayerForward"]


@dataclass(frozen=True, eq=False)
class LayerForward:
    """A layer's forward, by way of isokern. An object, so that layers with it can be copied and pickled.

    Attributes:
        layer: the layer of transformers; its parameters are read in every call.
        backend: the backend to force, or None; layouts: shared by the layers of one model.
    """

    layer: Any
    family: Family
    backend: str | None
    layouts: Layouts

    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the stock forward: ``[B, T, hidden]`` in and out; the cache's states are updated in place.

        Raises:
            IntegrationError: a cache or a packed batch that cannot be served; neither has been changed.
            IsokernError: see the op.
        """
        layer, family = self.layer, self.family
        batch, length = hidden_states.shape[:2]
        offsets = packed_offsets(kwargs, batch)
        needs_grad = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(p.requires_grad for p in layer.parameters())
        )
        if cache_params is not None and needs_grad:
            if offsets is not None:
                found, supported = "a packed batch with a cache and gradients", "use_cache=False, or torch.no_grad()"
                raise IntegrationError("transformers", "cache", found, supported)
            # Gradients flow through the cached states there; the op updates its pool outside autograd.
            stock: torch.Tensor = type(layer).forward(layer, hidden_states, cache_params, attention_mask, **kwargs)
            return stock
        sequences = batch if offsets is None else offsets.shape[0] - 1
        states = None if cache_params is None else LayerStates.of(cache_params, layer.layer_idx)
        if states is not None:
            states.check(sequences, offsets is not None, hidden_states.device)

        functions = sys.modules[_home(family)]
        hidden_states = functions.apply_mask_to_padding_states(hidden_states, attention_mask)
        made = family.project(layer, hidden_states)
        qkv = self._convolve(functions, made.qkv.transpose(1, 2), cache_params, states, offsets, kwargs)

        heads = family.heads(layer)
        # The convolution leaves tokens innermost; the op's kernels read heads.
        keys, values = heads.h * heads.k, heads.hv * heads.v
        q, k, v = torch.split(qkv.transpose(1, 2).contiguous(), [keys, keys, values], dim=-1)
        shape = (sequences, heads.hv, heads.k, heads.v)
        pool = None if states is None else states.pool(shape, hidden_states.device)
        gates = family.gates(layer)
        longest = kwargs.get("max_length_q")
        o = registry.get("fused_sigmoid_gating")(
            gates.A_log,
            made.a,
            gates.dt_bias,
            1.0,
            20.0,
            q.view(batch, length, heads.h, heads.k),
            k.view(batch, length, heads.h, heads.k),
            v.view(batch, length, heads.hv, heads.v),
            made.b,
            pool,
            None if pool is None else slots(sequences, pool.device),
            None,
            True,
            self.layouts.of(offsets) if offsets is not None and needs_grad else offsets,
            is_kda=gates.is_kda,
            lower_bound=gates.lower_bound,
            allow_neg_eigval=gates.allow_neg_eigval,
            max_seqlen=longest if offsets is not None and type(longest) is int else None,
            backend=self.backend,
        )
        return family.finish(layer, o, made.z)

    def _convolve(
        self,
        functions: Any,
        x: torch.Tensor,
        cache: Any,
        states: LayerStates | None,
        offsets: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """``x`` ``[B, channels, T]`` through the layer's causal convolution, which keeps its inputs in the cache."""
        layer = self.layer
        weight, bias, length = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, x.shape[-1]
        convolved: torch.Tensor
        if states is not None and states.conv is not None and length == 1 and not states.recording:
            convolved = functions.causal_conv1d_update(x, states.conv, weight, bias, layer.activation)
            return convolved
        inputs = x
        if cache is not None:
            inputs = cache.update_conv_state(x, layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)
        if offsets is not None:
            return packed_conv(x, offsets, weight, bias, layer.activation)
        convolved = functions.causal_conv1d_fn(inputs, weight, bias, activation=layer.activation, **kwargs)
        return convolved[..., -length:]  # what came before was only to be looked at


def _home(family: Family) -> str:
    """The module of transformers that defines the layer, which holds the functions it calls."""
    return f"transformers.models.{family.module}.modeling_{family.module}"
