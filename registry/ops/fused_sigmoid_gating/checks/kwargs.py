"""Deriving one call's arguments from another's: the transformations of the metamorphic relations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..case import CaseSpec
from ..inputs import make_inputs

__all__ = ["Kwargs", "Span", "fresh", "offsets_of", "permute_values", "select_spans", "to_head", "with_slots"]

Kwargs = dict[str, Any]
#: ``(sequence, first, last)``: tokens first..last-1 of one sequence.
Span = tuple[int, int, int]

_PER_TOKEN = ("q", "k", "v", "a", "b")
_PER_SEQUENCE = (
    "initial_state_indices",
    "output_state_indices",
    "intermediate_state_indices",
    "retrieve_parent_token",
)


def fresh(spec: CaseSpec, seed: int | None = None, device: torch.device | str = "cpu") -> Kwargs:
    """The arguments of ``spec``, newly made: nothing is shared with other calls."""
    return dict(make_inputs(spec, seed, device).kwargs)


def offsets_of(spec: CaseSpec) -> tuple[int, ...]:
    """``N + 1`` offsets of the case's sequences."""
    offsets = [0]
    for length in spec.lengths:
        offsets.append(offsets[-1] + length)
    return tuple(offsets)


def select_spans(kwargs: Kwargs, spec: CaseSpec, spans: Sequence[Span]) -> Kwargs:
    """A packed call whose sequences are these spans of the given one's, each with its sequence's slot and row."""
    offsets = offsets_of(spec)
    rows = [r for n, first, last in spans for r in range(offsets[n] + first, offsets[n] + last)]
    device = kwargs["q"].device
    at = torch.tensor(rows, dtype=torch.int64, device=device)
    which = torch.tensor([n for n, _, _ in spans], dtype=torch.int64, device=device)
    changed = dict(kwargs)
    for name in _PER_TOKEN:
        changed[name] = kwargs[name].flatten(0, 1).index_select(0, at).unsqueeze(0)
    for name in _PER_SEQUENCE:
        if kwargs.get(name) is not None:
            changed[name] = kwargs[name].index_select(0, which)
    total, cu = 0, [0]
    for _, first, last in spans:
        total += last - first
        cu.append(total)
    dtype = torch.int64 if spec.cu_dtype == "int64" else torch.int32
    changed["cu_seqlens"] = torch.tensor(cu, dtype=dtype, device=device)
    return changed


def to_head(kwargs: Kwargs, head: int, spec: CaseSpec) -> Kwargs:
    """Only value head ``head`` and its query/key head."""
    group = head // (spec.hv // spec.h)
    one, shared = slice(head, head + 1), slice(group, group + 1)
    changed = dict(kwargs)
    for name in ("A_log", "dt_bias"):
        changed[name] = kwargs[name][one].contiguous()
    for name in ("v", "a", "b"):
        changed[name] = kwargs[name][:, :, one].contiguous()
    for name in ("q", "k"):
        changed[name] = kwargs[name][:, :, shared].contiguous()
    if kwargs.get("initial_state_source") is not None:
        changed["initial_state_source"] = kwargs["initial_state_source"][:, one].contiguous()
    return changed


def permute_values(kwargs: Kwargs, order: torch.Tensor) -> Kwargs:
    """Columns of v, and of the states, in another order."""
    changed = dict(kwargs)
    changed["v"] = kwargs["v"][..., order].contiguous()
    pool = kwargs["initial_state_source"]
    picked = pool[..., order] if kwargs["state_layout"] == "kv" else pool[..., order, :]
    changed["initial_state_source"] = picked.contiguous()
    return changed


def with_slots(kwargs: Kwargs, slots: Sequence[int]) -> Kwargs:
    """The same call with these slots (read, and written in place)."""
    given = kwargs["initial_state_indices"]
    return {**kwargs, "initial_state_indices": torch.tensor(slots, dtype=given.dtype, device=given.device)}
