"""The configs worth trying on a problem, the heuristic default first. None of them changes a bit of the result."""

from __future__ import annotations

from itertools import product

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .variant import CHUNK, WARP

__all__ = ["configs_for", "default_for", "every_config"]

#: State values per lane beyond which a lane runs out of registers; the fewer where strides take up many of them.
_MOST_STATE, _FEWER_STATE = 128, 32
#: Static shared memory of a block, and registers of a multiprocessor.
_MOST_SHARED = 48 * 1024
_REGISTERS = 64 * 1024
#: Multiprocessors of an H100, and as many warps as give three in four of their schedulers one.
_MULTIPROCESSORS = 132
_ENOUGH_WARPS = 3 * _MULTIPROCESSORS
_MOST_CONFIGS = 16
#: Tokens from which a sequence is long: warps that only stage pay when a window is staged while another is computed.
_LONG = 16
_STAGERS = 4
#: Tokens of a window that one warp stages at most where every K value has a gate. Of more, the compiler leaves the loop
#: over them as a loop, and the registers that it indexes become memory.
_MOST_KDA_TOKENS = 4


def configs_for(problem: Problem) -> tuple[Config, ...]:
    """At most sixteen configs for ``problem``: the default, then its neighbours, nearest first."""
    default = default_for(problem)
    others = [config for config in every_config(problem) if config != default]
    others.sort(key=lambda config: (_distance(config, default), config.items))
    return (default, *others[: _MOST_CONFIGS - 1])


def every_config(problem: Problem) -> tuple[Config, ...]:
    """All that fit the problem and the chip, in no order of merit."""
    found: dict[Config, None] = {}
    choices = product((1, 2, 4, 8), (1, 2, 4, 8), _lane_choices(problem.k), (0, _STAGERS), (False, True), (8, 16))
    for columns, warps, lanes, stagers, streaming, window in choices:
        for resident in (1, _resident(problem, lanes, columns, warps + stagers)):
            config = _config(problem, lanes, columns, warps, resident, stagers, streaming, window)
            if config is not None:
                found[config] = None
    return tuple(found)


def default_for(problem: Problem) -> Config:
    """The heuristic: as many columns per lane as still give every scheduler of the chip a warp.

    Below that a token's latency is what counts. Decodes are bound by memory or by latency, never by arithmetic: they
    keep to two columns, and small blocks, unless V is contiguous: then wide accesses need columns.
    """
    lanes, pairs = _lanes(problem), max(1, problem.profile.n) * problem.hv
    most = 2 if _is_direct(problem) and problem.state_layout == "vk" else 4
    few = None
    for columns in (4, 2, 1):
        per_warp = WARP // lanes * columns
        warps = min(4, 1 << (max(1, problem.v // per_warp).bit_length() - 1))
        total = pairs * -(-problem.v // per_warp)
        full = total // warps >= 2 * _MULTIPROCESSORS
        if full and _several(problem) and not _is_long(problem):
            warps = min(2, warps)  # blocks whose loads, arithmetic and stores fall apart in time
        stagers = _STAGERS if _is_long(problem) and not full else 0
        resident = _resident(problem, lanes, columns, warps) if full else 1
        few = _config(problem, lanes, columns, warps, resident, stagers, False, 8)
        if few is not None and columns <= most and (total >= _ENOUGH_WARPS or columns == 1):
            return few
    assert few is not None, "one column per lane always fits"
    return few


def _is_old(problem: Problem) -> bool:
    """Before sm_90 the assembler keeps the kernel's 64-bit parameters in registers."""
    return problem.arch < 90


def _most_state(problem: Problem) -> int:
    return _FEWER_STATE if problem.strides == "any" or _is_old(problem) else _MOST_STATE


def _several(problem: Problem) -> bool:
    """Whether sequences may have more than one token."""
    return problem.profile.longest != 1


def _is_long(problem: Problem) -> bool:
    return problem.profile.longest is None or problem.profile.longest >= _LONG


def _is_direct(problem: Problem) -> bool:
    """Whether the kernel of ``decode`` serves: KDA's gates are too much work for every group of lanes to repeat."""
    return not _several(problem) and not problem.is_kda and problem.intermediates == "none"


def _lanes(problem: Problem) -> int:
    """Lanes that share K: eight, but none without a chunk of it.

    Where V is contiguous and one token is all there is, four: the groups' columns then are a line of 128 bytes.
    """
    chunks = -(-problem.k // CHUNK)
    usual = 4 if _is_direct(problem) and problem.state_layout == "kv" and problem.k <= 128 else 8
    return min(usual, 1 << max(0, (chunks - 1).bit_length()))


def _lane_choices(k: int) -> tuple[int, ...]:
    """Every number of lanes from 4 to 16 that leaves no lane without a chunk; fewer where K is small."""
    chunks = -(-k // CHUNK)
    most = min(16, 1 << max(0, (chunks - 1).bit_length()))
    return tuple(lanes for lanes in (1, 2, 4, 8, 16) if most // 4 <= lanes <= most and lanes)


def _per_lane(problem: Problem, lanes: int) -> int:
    return -(-problem.k // (CHUNK * lanes)) * CHUNK


def _resident(problem: Problem, lanes: int, columns: int, warps: int) -> int:
    """Blocks per multiprocessor that the compiler reaches without spilling, as ``resources.json`` shows."""
    per_lane = _per_lane(problem, lanes)
    needed = columns * per_lane + 64 + (32 if problem.is_kda else 0)
    needed += 2 * max(0, per_lane - 16)  # key and query
    needed += 96 if _is_old(problem) else 0
    needed += 64 if problem.strides == "any" else 0
    return max(1, min(16, _REGISTERS // (WARP * warps * min(255, needed))))


def _config(
    problem: Problem, lanes: int, columns: int, warps: int, resident: int, stagers: int, streaming: bool, window: int
) -> Config | None:
    """The config with these numbers if it fits the problem and the chip, else None.

    ``window`` is what several tokens are staged by at most; fewer where sequences or shared memory are shorter.
    """
    several, per_lane = _several(problem), _per_lane(problem, lanes)
    tile = warps * (WARP // lanes) * columns
    slots = stagers or warps
    longest = problem.profile.longest or window
    window = max(slots, min(window, 1 << (longest - 1).bit_length())) if several else warps
    if problem.is_kda:
        window = min(window, _MOST_KDA_TOKENS * slots)
    per_token = 2 * 4 * ((3 if problem.is_kda else 2) * per_lane * lanes + tile + 2)
    while window * per_token > _MOST_SHARED and window > slots:
        window //= 2
    if _is_direct(problem):
        window = 0
    wasteful = tile > WARP // lanes and tile >= 2 * problem.v
    if columns * per_lane > _most_state(problem) or window * per_token > _MOST_SHARED or wasteful:
        return None
    if (stagers and not _is_long(problem)) or (streaming and several):
        return None
    return Config.of(
        lanes=lanes,
        columns=columns,
        warps=warps,
        window=window,
        stagers=stagers,
        overlap=several,
        streaming=streaming,
        resident=resident,
    )


def _distance(config: Config, default: Config) -> int:
    """In doublings, over all numbers, with columns of a warp instead of a lane; what is on or off counts as well.

    Most of all whether registers are bounded: where the default bounds them, they rarely ought to be left alone.
    """

    def numbers(config: Config) -> tuple[int, ...]:
        lanes, columns = int(config["lanes"]), int(config["columns"])
        return lanes, WARP // lanes * columns, int(config["warps"]), int(config["window"])

    pairs = zip(numbers(config), numbers(default), strict=True)
    doublings = sum(abs(mine.bit_length() - other.bit_length()) for mine, other in pairs)
    switched = sum(config[name] != default[name] for name in ("stagers", "streaming"))
    return doublings + switched + 2 * ((config["resident"] == 1) != (default["resident"] == 1))
