"""The policies, the robust statistics and the screen, on synthetic timings."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest

import isokern.autotune.screen
from isokern.autotune.policy import MeasurePolicy, PromotionPolicy, RacePolicy, ScreenPolicy
from isokern.autotune.samples import (
    BlockTable,
    TimingError,
    below_floor,
    checked_seconds,
    format_seconds,
    log_estimate,
    mad_sigma,
    percent,
    t_quantile,
)
from isokern.autotune.screen import Screen, UnfinishedScreenError
from isokern.errors import ArgumentValueError, UnknownNameError
from isokern.registry.decision import RejectCode

US = 1e-6
IMPOSSIBLE = [0.0, -1e-6, math.nan, math.inf, -math.inf, "12", None, True]


def screened(times, protected=(), policy=None):
    """A screen that has seen noiseless samples of ``times``."""
    screen = Screen(list(times), protected, policy)
    for name, seconds in times.items():
        while screen.wants(name):
            screen.record(name, seconds)
    return screen


# -- policies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ScreenPolicy(first_samples=0), "first_samples"),
        (lambda: ScreenPolicy(drop_ratio=1.0), "drop_ratio"),
        (lambda: ScreenPolicy(abandon_ratio=1.2), "abandon_ratio"),
        (lambda: RacePolicy(rounds=()), "rounds"),
        (lambda: RacePolicy(rounds=(5, 0)), "rounds"),
        (lambda: RacePolicy(significance=1.0), "significance"),
        (lambda: RacePolicy(min_blocks=76), "min_blocks"),
        (lambda: RacePolicy(wall_cap_s=math.nan), "wall_cap_s"),
        (lambda: PromotionPolicy(min_improvement=0.005), "min_improvement"),
        (lambda: MeasurePolicy(mode="lazy"), "mode"),
        (lambda: MeasurePolicy(floor_tolerance=1.5), "floor_tolerance"),
        (lambda: MeasurePolicy().launches_per_sample(0.0), "launch_s"),
    ],
)
def test_an_unusable_threshold_is_refused_by_name(make, argument):
    with pytest.raises(ArgumentValueError) as caught:
        make()
    assert caught.value.argument == argument


def test_a_sample_repeats_short_launches_until_the_clock_resolves_it():
    policy = MeasurePolicy(min_sample_us=50.0)
    assert policy.launches_per_sample(9 * US) == 6
    assert policy.launches_per_sample(50 * US) == 1
    assert policy.launches_per_sample(3e-3) == 1


def test_eager_and_graph_timings_have_different_keys():
    assert MeasurePolicy(mode="eager").key() != MeasurePolicy(mode="graph").key()


# -- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", IMPOSSIBLE, ids=repr)
def test_an_impossible_timing_names_its_candidate(seconds):
    with pytest.raises(TimingError, match="'triton'") as caught:
        checked_seconds("triton", seconds)
    assert caught.value.candidate == "triton"


@pytest.mark.parametrize(
    ("upper_tail", "degrees", "expected"),
    [  # the usual tables
        (0.05, 1, 6.3138),
        (0.001, 1, 318.309),
        (0.025, 2, 4.3027),
        (0.005, 5, 4.0321),
        (0.01, 10, 2.7638),
        (0.0005, 30, 3.6460),
        (0.025, 1e4, 1.9602),
    ],
)
def test_t_quantiles_agree_with_the_tables(upper_tail, degrees, expected):
    assert t_quantile(upper_tail, float(degrees)) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("blocks", "candidates"), [(5, 2), (5, 9), (15, 4), (35, 2)])
def test_equal_candidates_are_told_apart_no_oftener_than_stated(blocks, candidates):
    """The interval of a comparison holds at small numbers of blocks, where a MAD alone would not."""
    rng = np.random.default_rng(blocks * 100 + candidates)
    tail, trials, wrong = 0.02, 400, 0
    names = [f"c{i}" for i in range(candidates)]
    for _ in range(trials):
        table = BlockTable()
        for times in np.exp(0.01 * rng.standard_normal((blocks, candidates))):
            table.append(dict(zip(names, times, strict=True)))
        wrong += table.compare("c0", "c1", names).low(tail) > 0.0
    assert wrong / trials <= tail + 0.012  # two standard errors of the count


def test_outliers_move_neither_centre_nor_scale():
    clean = np.linspace(-0.01, 0.01, 21)
    spiked = np.concatenate([clean, [math.log(10.0)] * 4])
    assert abs(np.median(spiked)) < 0.003
    assert mad_sigma(spiked) < 1.5 * mad_sigma(clean)


def test_fewer_than_three_pairs_prove_nothing():
    assert log_estimate(np.array([0.5, 0.5])).low(0.02) == -math.inf
    assert log_estimate(np.array([])).high(0.02) == math.inf
    assert log_estimate(np.array([0.5, 0.5, 0.5]), sigma_floor=0.01).low(0.02) > 0.0


def test_a_coarse_clock_widens_the_interval():
    """With whole quanta every difference is the same, and a MAD of zero would prove anything."""
    fine, coarse = BlockTable(), BlockTable(resolution=0.05)
    for _ in range(10):
        fine.append({"a": 10.5 * US, "b": 10.0 * US})
        coarse.append({"a": 10.5 * US, "b": 10.0 * US})
    assert fine.compare("a", "b", ["a", "b"]).stderr == 0.0
    assert coarse.compare("a", "b", ["a", "b"]).stderr > 0.005


def test_drift_cancels_in_paired_differences():
    table = BlockTable()
    for block in range(20):
        clock = 1.0 + 0.05 * block
        table.append({"a": 11 * US * clock, "b": 10 * US * clock})
    assert table.compare("a", "b", ["a", "b"]).centre == pytest.approx(math.log(1.1))
    assert table.leader(["a", "b"]) == "b"
    assert table.seconds("b")[0] == 10 * US


def test_faster_than_the_hardware_is_below_the_floor():
    assert below_floor(8.9 * US, 10 * US, 0.9)
    assert not below_floor(9.1 * US, 10 * US, 0.9)
    assert not below_floor(1 * US, 0.0, 0.9)
    with pytest.raises(ValueError, match="floor_s"):
        below_floor(1 * US, math.nan, 0.9)


def test_times_and_ratios_print_for_people():
    assert format_seconds(1.234e-5) == "12.3 us"
    assert format_seconds(0.8121) == "812 ms"
    assert format_seconds(2.5) == "2.5 s"
    assert format_seconds(3e-8) == "30 ns"
    assert percent(math.log(1.018)) == "1.8 %"


# -- screen ---------------------------------------------------------------------------------------------------


def test_the_slow_are_dropped_with_a_reason_and_the_rest_race_in_declared_order():
    result = screened({"slow": 16 * US, "b": 14 * US, "a": 10 * US}).result()
    assert result.finalists == ("b", "a")
    assert result.dropped["slow"].code is RejectCode.SLOW
    assert result.dropped["slow"].reason == "median 16 us, 1.60x the best (10 us)"
    assert result.samples["slow"] == (16 * US,) * 5


def test_at_most_keep_finalists_besides_the_protected():
    times = {f"c{i:02d}": (100 + i) * US for i in range(20)}
    result = screened(times, protected=("c18", "c01"), policy=ScreenPolicy(keep=8)).result()
    assert result.finalists == (*(f"c{i:02d}" for i in range(9)), "c18")
    assert "rank 9" in result.dropped["c09"].reason


def test_protected_candidates_are_kept_and_fully_sampled_however_slow():
    times = {"fast": 1 * US, "default": 500 * US, "incumbent": 90 * US, "other": 500 * US}
    screen = screened(times, protected=("incumbent", "default"))
    result = screen.result()
    assert result.finalists == ("fast", "default", "incumbent")
    assert len(result.samples["default"]) == 5
    assert list(result.dropped) == ["other"]


def test_two_hopeless_calls_end_the_candidate():
    screen = Screen(["fast", "cold", "hopeless"])
    while screen.wants("fast"):
        screen.record("fast", 10 * US)
    assert screen.record("cold", 39 * US)  # a cold first call may cost this
    assert screen.record("hopeless", 43 * US)  # one call may be a stall
    assert not screen.record("hopeless", 41 * US)
    assert screen.wants("hopeless") == 0
    while screen.wants("cold"):
        screen.record("cold", 10 * US)
    result = screen.result()
    assert result.finalists == ("fast", "cold")  # the first call was no sample
    assert result.dropped["hopeless"].reason == (
        "abandoned after 2 calls, none under 41 us: 4.1x the best so far (10 us)"
    )
    assert result.samples["hopeless"] == (41 * US,)


def test_a_stall_in_the_first_call_costs_nothing():
    screen = Screen(["fast", "stalls"])
    for name, samples in {"fast": [10] * 6, "stalls": [100, 9, 9, 9, 9, 9]}.items():
        for t in samples:
            screen.record(name, t * US)
    assert screen.result().finalists == ("fast", "stalls")


def test_the_number_of_calls_before_giving_up_is_policy():
    screen = Screen(["fast", "slow"], policy=ScreenPolicy(abandon_calls=1))
    screen.record("fast", 10 * US)
    assert not screen.record("slow", 41 * US)


def test_two_outliers_among_five_samples_do_not_drop_a_candidate():
    screen = Screen(["a", "b"])
    for name, samples in {"a": [10] * 6, "b": [11, 11, 110, 11, 110, 11]}.items():
        for t in samples:
            screen.record(name, t * US)
    assert screen.result().finalists == ("a", "b")


def test_passes_visit_everyone_until_all_are_done():
    screen = Screen(["a", "b", "hopeless"])
    passes = []
    while screen.pending():
        passes.append(screen.pending())
        for name in screen.pending():
            screen.record(name, {"a": 1, "b": 2, "hopeless": 9}[name] * US)
    assert passes == [("a", "b", "hopeless")] * 2 + [("a", "b")] * 4


def test_a_candidate_that_failed_is_forgotten():
    screen = screened({"a": 10 * US, "crash": 1 * US}, protected=("crash",))
    screen.remove("crash")
    assert screen.result().finalists == ("a",)
    with pytest.raises(UnknownNameError):
        screen.wants("crash")


@pytest.mark.parametrize("seconds", IMPOSSIBLE, ids=repr)
def test_the_screen_refuses_impossible_timings_and_records_nothing(seconds):
    screen = Screen(["a"])
    with pytest.raises(TimingError, match="'a'"):
        screen.record("a", seconds)
    assert screen.wants("a") == 6


def test_the_screen_is_used_in_step():
    screen = Screen(["a", "b"])
    with pytest.raises(UnfinishedScreenError, match="'a', 'b'") as caught:
        screen.result()
    assert caught.value.missing == ("a", "b")
    with pytest.raises(UnknownNameError):
        screen.record("c", 1 * US)
    while screen.wants("a"):
        screen.record("a", 1 * US)
    with pytest.raises(ValueError, match="no more samples"):
        screen.record("a", 1 * US)
    with pytest.raises(UnknownNameError):
        Screen(["a"], protected=("b",))
    with pytest.raises(ValueError, match="unique"):
        Screen(["a", "a"])


def test_decision_logic_needs_no_framework():
    """Tested without torch, usable without torch: standard library, numpy and the package's own records only."""
    allowed = {"errors", "registry.decision", "policy", "samples", "screen", "sentinel", "race", "select"}
    folder = Path(isokern.autotune.screen.__file__).parent
    for name in ("policy", "samples", "screen", "sentinel", "race", "select", "simulate"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in allowed, f"{name} imports {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {m.split(".")[0] for m in modules} & {"torch", "triton", "cupy", "numba"}, name
