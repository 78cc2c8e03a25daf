"""The state of one layer in a cache of transformers, as the op's pool: the cache's own tensor, no copy of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import cache_utils

from ...errors import IntegrationError

__all__ = ["LayerStates"]

_SUPPORTED = "transformers' own caches (DynamicCache, StaticCache), whose linear-attention layers update in place"


@dataclass(slots=True)
class LayerStates:
    """What a cache holds for one layer before the call.

    Attributes:
        kept: the cache's layer. conv: ``[B, channels, width]``, recurrent: ``[B, HV, K, V]``; None before the first
            call. recording: whether the cache keeps past inputs of the convolution for going back.
    """

    kept: Any
    conv: torch.Tensor | None
    recurrent: torch.Tensor | None
    recording: bool

    @classmethod
    def of(cls, cache: Any, layer_idx: int) -> LayerStates:
        """Look, and change nothing.

        Raises:
            IntegrationError: a cache, or a layer of it, that does not keep its states as transformers' own do.
        """
        kept = (
            cache.layers[layer_idx] if isinstance(cache, cache_utils.Cache) and layer_idx < len(cache.layers) else None
        )
        if (
            kept is None
            or type(cache).update_recurrent_state is not cache_utils.Cache.update_recurrent_state
            or type(cache).get_recurrent_state is not cache_utils.Cache.get_recurrent_state
            or not isinstance(kept, cache_utils.LinearAttentionLayer)
            or type(kept).update_recurrent_state is not cache_utils.LinearAttentionLayer.update_recurrent_state
        ):
            found = f"{type(cache).__name__} with {type(kept).__name__} for layer {layer_idx}"
            raise IntegrationError("transformers", "cache", found, _SUPPORTED)
        conv, recurrent = cache.get_conv_state(layer_idx), cache.get_recurrent_state(layer_idx)
        return cls(kept, conv, recurrent, bool(cache.is_recording_past(layer_idx)))

    def check(self, sequences: int, packed: bool, device: torch.device) -> None:
        """Raise IntegrationError where these states cannot continue with a batch of ``sequences``."""
        state = self.recurrent
        if state is None:
            return
        if packed:
            found = "a packed batch that continues from a cache"
            supported = "packed batches with a new cache, or without one"
            raise IntegrationError("transformers", "cache", found, supported)
        if state.shape[0] != sequences or state.device != device:
            found = f"states of {state.shape[0]} sequences on {state.device}"
            raise IntegrationError("transformers", "cache", found, f"those of the batch: {sequences} on {device}")

    def pool(self, shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
        """``shape`` ``[B, HV, K, V]`` of states to read and update: what came before, or zeros."""
        if self.recurrent is not None:
            return self.recurrent
        kept = self.kept
        if not kept.is_recurrent_states_initialized[0]:
            # The cache allocates like what it is shown; this shows it a shape and costs no memory.
            shown = torch.zeros((), dtype=torch.float32, device=device).expand(shape)
            kept.lazy_initialization(recurrent_states=shown)
        else:
            kept.recurrent_states[0].zero_()
        state: torch.Tensor = kept.recurrent_states[0]
        return state
