"""Calls the op must refuse: each changes one valid call and names the error and the argument it must report.

A refusal is a typed error raised before anything is written; the tests that walk this list also compare every
tensor bit by bit afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from ...varlen.layout import SequenceLayout
from .case import CaseSpec

__all__ = ["ERROR_INPUTS", "ErrorInput", "Kwargs"]

Kwargs = dict[str, Any]
Change = Callable[[Kwargs], Kwargs]


@dataclass(frozen=True, slots=True)
class ErrorInput:
    """One call the op must refuse.

    Attributes:
        name: unique; what is wrong with the call.
        base: the valid call it is made from.
        change: takes the valid call's arguments and returns those to replace; never writes to them.
        error: exact class of the error expected.
        argument: the error's ``argument`` attribute.
        needs_full: only ``validate="full"`` can see it (the fault is in values, not in shapes, types or devices),
            seen_on_host: unless they are on a CPU, where every call sees it.
    """

    name: str
    base: CaseSpec
    change: Change
    error: type[ArgumentError]
    argument: str
    needs_full: bool = False
    seen_on_host: bool = False

    def apply(self, kwargs: Kwargs) -> Kwargs:
        """The refused call's arguments, made from the valid call's."""
        return {**kwargs, **self.change(kwargs)}


TypeErr, ValueErr = ArgumentTypeError, ArgumentValueError
CU, POOL, BUFFER = "cu_seqlens", "initial_state_source", "intermediate_states_buffer"
R, W = "initial_state_indices", "output_state_indices"
ROWS, PARENTS = "intermediate_state_indices", "retrieve_parent_token"

GDN = CaseSpec("gdn", (3, 0, 2), h=2, hv=4, k=8, v=6, extra_rows=1)
KDA = GDN.but(name="kda", is_kda=True)
F32 = GDN.but(name="float32", io_dtype="float32")
BATCH = GDN.but(name="batch", varlen=False, lengths=(3, 3), extra_rows=0)
VK = GDN.but(name="vk", state_layout="vk")
SEPARATE = GDN.but(name="separate", update="separate")
READ_ONLY = GDN.but(name="read_only", update="disabled")
STATELESS = GDN.but(name="stateless", state_dtype=None)
CHAIN = GDN.but(name="chain", verify="chain")
TREE = GDN.but(name="tree", verify="tree")
EVERYTHING = TREE.but(name="everything", update="separate")

#: Tensor arguments of a call.
FLOATS = ("A_log", "a", "dt_bias", "q", "k", "v", "b")
STATES = (POOL, BUFFER)
INDICES = (CU, R, W, ROWS, PARENTS)
SCALARS = ("softplus_beta", "softplus_threshold", "scale")
FLAGS = ("use_qk_l2norm_in_kernel", "is_kda", "allow_neg_eigval", "disable_state_update")


def _set(name: str, value: Any) -> Change:
    return lambda _: {name: value}


def _map(name: str, how: Callable[[torch.Tensor], Any]) -> Change:
    return lambda kwargs: {name: how(kwargs[name])}


def _to(name: str, dtype: torch.dtype) -> Change:
    return _map(name, lambda t: t.to(dtype))


def _ints(name: str, *values: Any) -> Change:
    """Other values in a tensor of the same dtype."""
    return _map(name, lambda t: torch.tensor(values, dtype=t.dtype).reshape(-1, *t.shape[1:]))


def _out(how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """``out`` made from a correct one, which has v's shape and q's dtype."""
    return lambda kwargs: {"out": how(torch.full_like(kwargs["v"], float("nan")))}


def _overlapping(t: torch.Tensor) -> torch.Tensor:
    """The same shape, its first axis advancing by one element only: rows share memory, yet no stride is 0."""
    return t.clone().as_strided(t.shape, (1, *t.stride()[1:]))


def _not_a_tensor() -> list[ErrorInput]:
    cases = []
    for name in (*FLOATS, *STATES, *INDICES):
        cases.append(ErrorInput(f"{name}: a list", EVERYTHING, _map(name, lambda t: t.tolist()), TypeErr, name))
        cases.append(ErrorInput(f"{name}: a numpy array", EVERYTHING, _map(name, _as_numpy), TypeErr, name))
    cases += [ErrorInput(f"{name}: None", GDN, _set(name, None), TypeErr, name) for name in FLOATS]
    one = BATCH.but(name="one", lengths=(3,))
    cases.append(ErrorInput("cu_seqlens: a list, the batch being one", one, _set(CU, [0, 1, 3]), TypeErr, CU))
    cases.append(ErrorInput("out: a numpy array", GDN, lambda k: {"out": _as_numpy(k["v"])}, TypeErr, "out"))
    return cases


def _as_numpy(t: torch.Tensor) -> Any:
    return (t.float() if t.is_floating_point() else t).numpy()


def _wrong_dtype() -> list[ErrorInput]:
    cases = []
    for name in (*FLOATS, *STATES):
        for dtype in (torch.bool, torch.int32, torch.complex64, torch.float8_e4m3fn):
            cases.append(ErrorInput(f"{name}: {dtype}", EVERYTHING, _to(name, dtype), TypeErr, name))
        cases.append(ErrorInput(f"{name}: sparse", EVERYTHING, _map(name, lambda t: t.to_sparse()), TypeErr, name))
    for name in INDICES:
        for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool):
            cases.append(ErrorInput(f"{name}: {dtype}", EVERYTHING, _to(name, dtype), TypeErr, name))
    cases += [
        ErrorInput("k: not q's dtype", GDN, _map("k", torch.Tensor.float), TypeErr, "k"),
        ErrorInput("v: not q's dtype", GDN, _map("v", torch.Tensor.float), TypeErr, "v"),
        ErrorInput("out: not q's dtype", GDN, _out(torch.Tensor.float), TypeErr, "out"),
        ErrorInput("out: integers", GDN, _out(torch.Tensor.int), TypeErr, "out"),
        ErrorInput("write slots: another integer type", SEPARATE, _map(W, torch.Tensor.long), TypeErr, W),
    ]
    return cases


def _wrong_rank_or_shape() -> list[ErrorInput]:
    cases = []
    for name in (*FLOATS, *STATES, *INDICES):
        one_more = _map(name, lambda t: t.unsqueeze(0))
        cases.append(ErrorInput(f"{name}: one axis too many", EVERYTHING, one_more, ValueErr, name))
        cases.append(ErrorInput(f"{name}: a scalar", EVERYTHING, _map(name, lambda t: t.flatten()[0]), ValueErr, name))
    for name in ("A_log", "dt_bias", "a", "b", *STATES):
        short = _map(name, lambda t: t[..., :-1])
        cases.append(ErrorInput(f"{name}: last axis too short", EVERYTHING, short, ValueErr, name))
    for name in ("k", "v", "a", "b"):
        short = _map(name, lambda t: t[:, :-1])
        cases.append(ErrorInput(f"{name}: fewer tokens than q", GDN, short, ValueErr, name))
        more = _map(name, lambda t: t[:1])
        cases.append(ErrorInput(f"{name}: fewer batch rows than q", BATCH, more, ValueErr, name))
    for name in (R, W, ROWS, PARENTS):
        cases.append(ErrorInput(f"{name}: N - 1 entries", EVERYTHING, _map(name, lambda t: t[:-1]), ValueErr, name))
        more = _map(name, lambda t: torch.cat([t, t[:1]]))
        cases.append(ErrorInput(f"{name}: N + 1 entries", EVERYTHING, more, ValueErr, name))
    cases += [
        ErrorInput("k: another K than q", GDN, _map("k", lambda t: t[..., :-1]), ValueErr, "k"),
        ErrorInput("k: another H than q", GDN, _map("k", lambda t: t[:, :, :1]), ValueErr, "k"),
        ErrorInput("k: HV heads", GDN, _map("k", lambda t: t.repeat_interleave(2, 2)), ValueErr, "k"),
        ErrorInput("HV = 3, H = 2", GDN.but(hv=3), _nothing, ValueErr, "v"),
        ErrorInput("HV = 2, H = 4", GDN.but(h=4, hv=2), _nothing, ValueErr, "v"),
        ErrorInput("q: no head", GDN, _map("q", lambda t: t[:, :, :0]), ValueErr, "q"),
        ErrorInput("q: K = 0", GDN, _map("q", lambda t: t[..., :0]), ValueErr, "q"),
        ErrorInput("v: no head", GDN, _map("v", lambda t: t[:, :, :0]), ValueErr, "v"),
        ErrorInput("v: V = 0", GDN, _map("v", lambda t: t[..., :0]), ValueErr, "v"),
        ErrorInput("a: one per value head, for KDA", KDA, _map("a", lambda t: t[..., 0]), ValueErr, "a"),
        ErrorInput("a: K per value head, without KDA", KDA, _set("is_kda", False), ValueErr, "a"),
        ErrorInput(
            "dt_bias: one per value head, for KDA", KDA, _map("dt_bias", lambda t: t[:, 0]), ValueErr, "dt_bias"
        ),
        ErrorInput("A_log: K per value head", KDA, lambda k: {"A_log": k["dt_bias"]}, ValueErr, "A_log"),
        ErrorInput("pool: another K", GDN, _map(POOL, lambda t: t[:, :, :-1]), ValueErr, POOL),
        ErrorInput("pool: another HV", GDN, _map(POOL, lambda t: t[:, :-1]), ValueErr, POOL),
        ErrorInput("pool: kv states, said to be vk", GDN, _set("state_layout", "vk"), ValueErr, POOL),
        ErrorInput("pool: vk states, said to be kv", VK, _set("state_layout", "kv"), ValueErr, POOL),
        ErrorInput("buffer: transposed states", CHAIN, _map(BUFFER, lambda t: t.mT), ValueErr, BUFFER),
        ErrorInput("buffer: too few steps", CHAIN, _map(BUFFER, lambda t: t[:, :2]), ValueErr, BUFFER),
        ErrorInput("parents: too few steps", TREE, _map(PARENTS, lambda t: t[:, :2]), ValueErr, PARENTS),
        ErrorInput("out: fewer tokens", GDN, _out(lambda t: t[:, :-1]), ValueErr, "out"),
        ErrorInput("out: H heads", GDN, _out(lambda t: t[:, :, :2]), ValueErr, "out"),
        ErrorInput("out: no batch axis", GDN, _out(lambda t: t[0]), ValueErr, "out"),
    ]
    return cases


def _nothing(_: Kwargs) -> Kwargs:
    return {}


def _wrong_memory() -> list[ErrorInput]:
    """Devices, and memory that a written tensor shares with itself or with another argument."""
    meta = lambda t: t.to("meta")  # noqa: E731
    cases = [
        ErrorInput(f"{name}: on another device", EVERYTHING, _map(name, meta), ValueErr, name)
        for name in (*FLOATS, *STATES, *INDICES)
        if name != "q"
    ]
    cases += [
        # q says where the call is, so the first tensor elsewhere is the one reported.
        ErrorInput("q: on another device", GDN, _map("q", meta), ValueErr, "A_log"),
        ErrorInput("out: on another device", GDN, _out(meta), ValueErr, "out"),
        ErrorInput("cu_seqlens: a layout on another device", GDN, _set("cu_seqlens", _layout_on_meta()), ValueErr, CU),
        ErrorInput("out: expanded", GDN, _out(lambda t: t[:, :1].expand_as(t)), ValueErr, "out"),
        ErrorInput("pool: expanded slots", GDN, _map(POOL, lambda t: t[:1].expand_as(t)), ValueErr, POOL),
        ErrorInput("pool: expanded heads", GDN, _map(POOL, lambda t: t[:, :1].expand_as(t)), ValueErr, POOL),
        ErrorInput("pool: overlapping slots", GDN, _map(POOL, _overlapping), ValueErr, POOL),
        ErrorInput("buffer: expanded rows", CHAIN, _map(BUFFER, lambda t: t[:1].expand_as(t)), ValueErr, BUFFER),
        ErrorInput("buffer: overlapping rows", CHAIN, _map(BUFFER, _overlapping), ValueErr, BUFFER),
        ErrorInput("read slots: expanded", GDN, _map(R, lambda t: t[:1].expand(3)), ValueErr, R),
        ErrorInput("read slots: every other", GDN, _map(R, lambda t: t.repeat_interleave(2)[::2]), ValueErr, R),
        ErrorInput("cu_seqlens: every other", GDN, _map(CU, lambda t: t.repeat_interleave(2)[::2]), ValueErr, CU),
        ErrorInput("parents: transposed", TREE, _map(PARENTS, lambda t: t.t().contiguous().t()), ValueErr, PARENTS),
        ErrorInput("out: is v", GDN.but(h=4), lambda k: {"out": k["v"]}, ValueErr, "out", needs_full=True),
        ErrorInput("out: inside the pool", F32, _out_in_pool, ValueErr, "out", needs_full=True),
        ErrorInput("buffer: inside the pool", GDN, _buffer_in_pool, ValueErr, BUFFER, needs_full=True),
    ]
    return cases


def _layout_on_meta() -> SequenceLayout:
    return SequenceLayout.from_lengths((3, 0, 2), device="meta")


def _out_in_pool(kwargs: Kwargs) -> Kwargs:
    shape = kwargs["v"].shape
    return {"out": kwargs[POOL].flatten()[: shape.numel()].view(shape)}


def _buffer_in_pool(kwargs: Kwargs) -> Kwargs:
    pool = kwargs[POOL]
    return {BUFFER: pool[:6].view(2, 3, *pool.shape[1:]), ROWS: torch.tensor([0, -1, 1], dtype=torch.int32)}


def _wrong_scalars() -> list[ErrorInput]:
    cases = []
    for name in SCALARS:
        for value in (0.0, -1.0, 0, float("nan"), float("inf"), -float("inf"), 1e39, 1e-46, 10**400):
            label = "10**400" if isinstance(value, int) and value else str(value)
            cases.append(ErrorInput(f"{name} = {label}", GDN, _set(name, value), ValueErr, name))
        for bad in (True, "1", 1j, torch.tensor(1.0), [1.0]):
            cases.append(ErrorInput(f"{name} = {bad!r}", GDN, _set(name, bad), TypeErr, name))
    for name in ("softplus_beta", "softplus_threshold"):
        cases.append(ErrorInput(f"{name} = None", GDN, _set(name, None), TypeErr, name))
    for name in FLAGS:
        for wrong in (1, 0, 1.0, None, "yes", torch.tensor(True)):
            cases.append(ErrorInput(f"{name} = {wrong!r}", GDN, _set(name, wrong), TypeErr, name))
    lower = "lower_bound"
    for value in (0.0, 5.0, float("nan"), -float("inf"), -1e39):
        cases.append(ErrorInput(f"{lower} = {value}", KDA, _set(lower, value), ValueErr, lower))
    cases += [
        ErrorInput("lower_bound without is_kda", GDN, _set(lower, -5.0), ValueErr, lower),
        ErrorInput("lower_bound = True", KDA, _set(lower, True), TypeErr, lower),
        ErrorInput("lower_bound: a tensor", KDA, _set(lower, torch.tensor(-5.0)), TypeErr, lower),
        ErrorInput("state_layout = 'KV'", GDN, _set("state_layout", "KV"), ValueErr, "state_layout"),
        ErrorInput("state_layout = 'vv'", GDN, _set("state_layout", "vv"), ValueErr, "state_layout"),
        ErrorInput("state_layout = None", GDN, _set("state_layout", None), ValueErr, "state_layout"),
        ErrorInput("max_seqlen = -1", GDN, _set("max_seqlen", -1), ValueErr, "max_seqlen"),
        ErrorInput("max_seqlen beyond T", GDN, _set("max_seqlen", 7), ValueErr, "max_seqlen"),
        ErrorInput("max_seqlen = 3.0", GDN, _set("max_seqlen", 3.0), TypeErr, "max_seqlen"),
        ErrorInput("max_seqlen = True", GDN, _set("max_seqlen", True), TypeErr, "max_seqlen"),
        ErrorInput("max_seqlen: a tensor", GDN, _set("max_seqlen", torch.tensor(3)), TypeErr, "max_seqlen"),
        ErrorInput("max_seqlen below the longest", GDN, _set("max_seqlen", 2), ValueErr, "max_seqlen", needs_full=True),
        ErrorInput("max_seqlen below T", BATCH, _set("max_seqlen", 2), ValueErr, "max_seqlen", needs_full=True),
    ]
    return cases


def _wrong_combinations() -> list[ErrorInput]:
    slots = torch.zeros(3, dtype=torch.int32)
    return [
        ErrorInput("read slots without a pool", STATELESS, _set(R, slots), ValueErr, R),
        ErrorInput("write slots without a pool", STATELESS, _set(W, slots), ValueErr, W),
        ErrorInput("a pool without read slots", GDN, _set(R, None), ValueErr, R),
        ErrorInput("write slots, the pool read only", READ_ONLY, _set(W, slots + 1), ValueErr, W),
        ErrorInput("rows without a buffer", GDN, _set(ROWS, slots), ValueErr, ROWS),
        ErrorInput("a buffer without rows", CHAIN, _set(ROWS, None), ValueErr, ROWS),
        ErrorInput("a tree without a buffer", GDN, _set(PARENTS, slots[:, None].repeat(1, 4)), ValueErr, PARENTS),
        ErrorInput("out, inputs require grad", GDN, _graded("q", out=True), ValueErr, "out"),
        ErrorInput("out requires grad", GDN, _out(lambda t: t.clone().requires_grad_()), ValueErr, "out"),
        ErrorInput("a buffer, inputs require grad", CHAIN, _graded("v"), ValueErr, BUFFER),
        ErrorInput("pool requires grad, updated in place", GDN, _graded(POOL), ValueErr, POOL),
        ErrorInput("pool requires grad, other slots written", SEPARATE, _graded(POOL), ValueErr, POOL),
    ]


def _graded(name: str, out: bool = False) -> Change:
    def change(kwargs: Kwargs) -> Kwargs:
        changed: Kwargs = {name: kwargs[name].clone().requires_grad_()}
        if out:
            changed["out"] = torch.full_like(kwargs["v"], float("nan"))
        return changed

    return change


def _wrong_offsets() -> list[ErrorInput]:
    cases = []
    for base in (GDN, GDN.but(name="gdn, int64", cu_dtype="int64")):
        cases += [
            ErrorInput(f"{base.name}: no offset", base, _map(CU, lambda t: t[:0]), ValueErr, CU),
            ErrorInput(f"{base.name}: first offset 1", base, _ints(CU, 1, 3, 3, 5), ValueErr, CU),
            ErrorInput(f"{base.name}: first offset -1", base, _ints(CU, -1, 3, 3, 5), ValueErr, CU),
            ErrorInput(f"{base.name}: decreasing offsets", base, _ints(CU, 0, 4, 3, 5), ValueErr, CU),
            ErrorInput(f"{base.name}: negative offset", base, _ints(CU, 0, -1, 3, 5), ValueErr, CU),
            ErrorInput(f"{base.name}: offsets past T", base, _ints(CU, 0, 3, 3, 7), ValueErr, CU),
            ErrorInput(f"{base.name}: another N", base, _ints(CU, 0, 3, 3, 4, 5), ValueErr, R),
        ]
    cases += [
        ErrorInput("B = 2 with cu_seqlens", BATCH, _set(CU, torch.tensor([0, 3, 3])), ValueErr, "q"),
        ErrorInput("B = 0 with cu_seqlens", BATCH.but(lengths=()), _set(CU, torch.tensor([0])), ValueErr, "q"),
        ErrorInput("a layout past T", GDN, _set(CU, SequenceLayout.from_lengths((3, 1, 3))), ValueErr, CU),
        ErrorInput("a layout whose offsets changed", GDN, _changed_layout, ValueErr, CU, needs_full=True),
    ]
    return cases


def _changed_layout(_: Kwargs) -> Kwargs:
    layout = SequenceLayout.from_lengths((3, 0, 2))
    layout.cu_seqlens[1] = 2
    return {CU: layout}


def _full(name: str, base: CaseSpec, change: Change, argument: str) -> ErrorInput:
    return ErrorInput(name, base, change, ValueErr, argument, needs_full=True)


def _beyond(name: str, base: CaseSpec, change: Change, argument: str) -> ErrorInput:
    return ErrorInput(name, base, change, ValueErr, argument, needs_full=True, seen_on_host=True)


def _wrong_slots() -> list[ErrorInput]:
    """Values on the device. GDN's pool has 6 slots, SEPARATE's 9; the buffer has 5 rows."""
    return [
        _beyond("slot beyond the pool", GDN, _ints(R, 0, 1, 6), R),
        _beyond("slot far beyond the pool", GDN, _ints(R, 0, 2**31 - 1, 1), R),
        _full("slot named twice", GDN, _ints(R, 4, 2, 4), R),
        _beyond("slot 0 of no slots", GDN, _map(POOL, lambda t: t[:0]), R),
        _beyond("slot beyond a pool that is only read", READ_ONLY, _ints(R, 0, 0, 6), R),
        _beyond("read slot beyond the pool", SEPARATE, _ints(R, 9, 1, 2), R),
        _beyond("write slot beyond the pool", SEPARATE, _ints(W, 0, 9, -1), W),
        _full("two sequences write one slot", SEPARATE, _ints(W, 5, 5, -1), W),
        _full("one reads what another writes", SEPARATE, _read_what_another_writes, W),
        _beyond("row beyond the buffer", CHAIN, _ints(ROWS, 0, 1, 5), ROWS),
        _full("row named twice", CHAIN, _ints(ROWS, 1, -1, 1), ROWS),
        _full("a parent that is the step itself", TREE, _parent(2, 2), PARENTS),
        _full("a parent that comes later", TREE, _parent(1, 2), PARENTS),
        _full("a parent beyond the buffer", TREE, _parent(2, 100), PARENTS),
    ]


def _read_what_another_writes(kwargs: Kwargs) -> Kwargs:
    read, write = kwargs[R].clone(), kwargs[W].clone()
    read[0] = write[2]
    return {R: read}


def _parent(step: int, parent: int) -> Change:
    def change(kwargs: Kwargs) -> Kwargs:
        parents = kwargs[PARENTS].clone()
        parents[0, step] = parent
        return {PARENTS: parents}

    return change


#: Every refused call. Names are unique.
ERROR_INPUTS: tuple[ErrorInput, ...] = (
    *_not_a_tensor(),
    *_wrong_dtype(),
    *_wrong_rank_or_shape(),
    *_wrong_memory(),
    *_wrong_scalars(),
    *_wrong_combinations(),
    *_wrong_offsets(),
    *_wrong_slots(),
)
