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
_MOST_CONFIGS = 12


def configs_for(problem: Problem) -> tuple[Config, ...]:
    """At most a dozen configs for ``problem``: the default, then its neighbours, nearest first."""
    default = default_for(problem)
    others = [config for config in every_config(problem) if config != default]
    others.sort(key=lambda config: (_distance(config, default), config.items))
    return (default, *others[: _MOST_CONFIGS - 1])


def every_config(problem: Problem) -> tuple[Config, ...]:
    """All that fit the problem and the chip, in no order of merit."""
    found: dict[Config, None] = {}
    for columns, warps, lanes in product((1, 2, 4, 8), (1, 2, 4, 8), _lane_choices(problem.k)):
        for resident in (1, _resident(problem, lanes, columns, warps)):
            config = _config(problem, lanes, columns, warps, resident)
            if config is not None:
                found[config] = None
    return tuple(found)


def default_for(problem: Problem) -> Config:
    """The heuristic: as many columns per lane as still give every scheduler of the chip a warp.

    Wide lanes load and store more per instruction and share staging among more columns; but below one warp per
    scheduler the chip is not full, and then a token's latency is what counts.
    """
    lanes = _lanes(problem.k)
    pairs = max(1, problem.profile.n) * problem.hv
    for columns in (4, 2, 1):
        per_warp = WARP // lanes * columns
        warps = min(4, 1 << (max(1, problem.v // per_warp).bit_length() - 1))
        total = pairs * -(-problem.v // per_warp)
        full = total // warps >= 2 * _MULTIPROCESSORS
        config = _config(problem, lanes, columns, warps, _resident(problem, lanes, columns, warps) if full else 1)
        if config is not None and (total >= _ENOUGH_WARPS or columns == 1):
            return config
    raise AssertionError("one column per lane always fits")


def _is_old(problem: Problem) -> bool:
    """Before sm_90 the assembler keeps the kernel's 64-bit parameters in registers."""
    return problem.arch < 90


def _most_state(problem: Problem) -> int:
    return _FEWER_STATE if problem.strides == "any" or _is_old(problem) else _MOST_STATE


def _several(problem: Problem) -> bool:
    """Whether sequences may have more than one token."""
    return problem.profile.longest != 1


def _lanes(k: int) -> int:
    """Lanes that share K: eight, but none without a chunk of it, and at most 32 values each."""
    chunks = -(-k // CHUNK)
    return min(8, 1 << max(0, (chunks - 1).bit_length()))


def _lane_choices(k: int) -> tuple[int, ...]:
    """Half and twice the usual number as well, while every lane has a chunk."""
    usual, chunks = _lanes(k), -(-k // CHUNK)
    return tuple(lanes for lanes in (usual, usual // 2, usual * 2) if 1 <= lanes < min(WARP + 1, 2 * chunks))


def _per_lane(problem: Problem, lanes: int) -> int:
    return -(-problem.k // (CHUNK * lanes)) * CHUNK


def _resident(problem: Problem, lanes: int, columns: int, warps: int) -> int:
    """Blocks per multiprocessor that the compiler reaches without spilling, as ``resources.json`` shows."""
    per_lane = _per_lane(problem, lanes)
    needed = columns * per_lane + (90 if _several(problem) else 64) + (32 if problem.is_kda else 0)
    needed += 2 * max(0, per_lane - 16)  # key and query
    needed += 96 if _is_old(problem) else 0
    needed += 64 if problem.strides == "any" else 0
    return max(1, min(16, _REGISTERS // (WARP * warps * min(255, needed))))


def _config(problem: Problem, lanes: int, columns: int, warps: int, resident: int) -> Config | None:
    """The config with these numbers if it fits the problem and the chip, else None."""
    several = _several(problem)
    per_lane = _per_lane(problem, lanes)
    tile = warps * (WARP // lanes) * columns
    window = max(8, warps) if several else warps
    per_token = 2 * 4 * ((3 if problem.is_kda else 2) * per_lane * lanes + tile + 2)
    while window * per_token > _MOST_SHARED and window > warps:
        window //= 2
    wasteful = tile > WARP // lanes and tile >= 2 * problem.v
    if columns * per_lane > _most_state(problem) or window * per_token > _MOST_SHARED or wasteful:
        return None
    return Config.of(lanes=lanes, columns=columns, warps=warps, window=window, overlap=several, resident=resident)


def _distance(config: Config, default: Config) -> int:
    """In doublings, over all numbers; another residency counts as one."""
    names = ("lanes", "columns", "warps", "window")
    doublings = sum(abs(int(config[name]).bit_length() - int(default[name]).bit_length()) for name in names)
    return doublings + (config["resident"] != default["resident"])
