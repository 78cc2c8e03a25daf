"""From a model's shard and a serving case to the concrete call that stands for it, and to its adversarial twin.

Free of torch: the process that plans a warm-up describes calls, workers make the tensors.
"""

from __future__ import annotations

import random

from ....errors import CatalogueError
from ...varlen.profile import VarlenProfile
from .case import CaseSpec
from .catalogue import Shard
from .problem import Intermediates, StateLayout
from .workload_case import Case, Phase, Verify

__all__ = ["adversarial_twin", "concrete"]

_VERIFY: dict[Verify, Intermediates] = {Verify.NONE: "none", Verify.CHAIN: "chain", Verify.TREE: "tree"}
_LAYOUTS: dict[str, StateLayout] = {"kv": "kv", "vk": "vk"}

#: At most this many tokens are taken from the longest sequence, so that it ends inside a chunk.
_SHAVE = 3
#: One sequence in so many of the adversarial twin is empty.
_EMPTY_DIVISOR = 8


def concrete(shard: Shard, case: Case, seed: int = 0) -> CaseSpec:
    """The call that ``case`` means on ``shard``.

    Packed as engines pass it: offsets known on the host, int32 indices, the state updated in place. In
    verification nothing is known to be accepted yet, so the pool is only read, and the state after every draft
    token goes to a buffer of the state's dtype.

    Raises:
        CatalogueError: the shard mixes dtypes that one call cannot.
    """
    types = shard.dtypes
    for group, names in (("q, k and v", (types.q, types.k, types.v)), ("a and b", (types.a, types.b))):
        if len(set(names)) > 1:
            raise CatalogueError(f"{shard.model}: {group} must share a dtype, given {', '.join(names)}")
    state = case.state_dtype or types.state
    return CaseSpec(
        name=case.name,
        lengths=case.lengths.lengths(),
        h=shard.H,
        hv=shard.HV,
        k=shard.K,
        v=shard.V,
        io_dtype=types.q,
        gate_dtype=types.a,
        A_log_dtype=types.A_log,
        dt_bias_dtype=types.dt_bias,
        state_dtype=state,
        state_layout=_LAYOUTS[case.state_layout or shard.state_layout],
        is_kda=shard.is_kda,
        lower_bound=shard.lower_bound,
        l2norm=shard.qk_l2norm,
        neg_eigval=shard.allow_neg_eigval,
        update="disabled" if case.phase is Phase.VERIFY else "in_place",
        verify=_VERIFY[case.verify],
        intermediate_dtype=state if case.verify is not Verify.NONE else "float32",
        as_layout=True,
        seed=seed,
    )


def adversarial_twin(spec: CaseSpec, seed: int = 1) -> CaseSpec:
    """Another call of the same problem, laid out to trip a kernel that was tried on tidy batches only.

    Some sequences are empty, the longest is a few tokens short of its round number, the order is permuted, and
    one sequence has no slot. As much of that as the problem's buckets and length class permit (a single decode
    row permits nothing but the missing slot); what is taken off the tokens comes back as rows beyond the last
    offset, which nobody may write.
    """
    draw = random.Random(seed)
    padded = spec.padded
    if not spec.varlen:
        return spec.but(name=f"{spec.name}, adversarial", padded=_one_without_slot(spec.lengths, padded, draw))
    wanted = VarlenProfile.of(spec.n, spec.tokens, max(spec.lengths, default=0))
    lengths = spec.lengths
    for empty, shave in ((True, True), (True, False), (False, True), (False, False)):
        trial = _perturbed(spec.lengths, draw, empty=empty, shave=shave)
        if VarlenProfile.of(len(trial), sum(trial), max(trial, default=0)) == wanted:
            lengths = trial
            break
    return spec.but(
        name=f"{spec.name}, adversarial",
        lengths=lengths,
        padded=_one_without_slot(lengths, (), draw),
        fresh=(),
        extra_rows=spec.extra_rows + spec.tokens - sum(lengths),
    )


def _perturbed(lengths: tuple[int, ...], draw: random.Random, *, empty: bool, shave: bool) -> tuple[int, ...]:
    changed = list(lengths)
    if shave and changed:
        longest = changed.index(max(changed))
        changed[longest] -= min(_SHAVE, max(0, changed[longest] - 1))
    if empty and len(changed) > 1:
        for _ in range(max(1, len(changed) // _EMPTY_DIVISOR)):
            changed[changed.index(min(x for x in changed if x or not any(changed)))] = 0
    draw.shuffle(changed)
    return tuple(changed)


def _one_without_slot(lengths: tuple[int, ...], padded: tuple[int, ...], draw: random.Random) -> tuple[int, ...]:
    held = [i for i, length in enumerate(lengths) if length and i not in padded]
    # With a single sequence a missing slot would leave no state to look at; two seeds judge it with one.
    return (*padded, draw.choice(held)) if len(held) > 1 else padded
