"""The race as a state machine: blocks, elimination, stopping, disturbed blocks, and exact resumption."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from isokern.autotune.policy import PromotionPolicy, RacePolicy
from isokern.autotune.race import Race, RaceError, Stop
from isokern.autotune.samples import TimingError
from isokern.autotune.select import select
from isokern.autotune.simulate import Noise, SyntheticDevice, tune
from isokern.errors import UnknownNameError
from isokern.registry.decision import RejectCode, Rejected

US = 1e-6
FIELD = {"a": 100 * US, "b": 101.5 * US, "c": 112 * US, "d": 160 * US, "default": 130 * US}
NEAR = {f"n{i}": (100 + 0.1 * i) * US for i in range(5)}


def run(race, device, blocks=None, **record):
    """Drive ``race`` for ``blocks`` blocks, or to its end."""
    while not race.finished and blocks != 0:
        race.record({name: device.time(name) for name in race.next_block()}, **record)
        blocks = None if blocks is None else blocks - 1
    return race


# -- blocks ---------------------------------------------------------------------------------------------------


def test_each_block_visits_every_survivor_once_in_a_fresh_reproducible_order():
    def orders(seed):
        race, device, seen = Race(list(NEAR), seed=seed), SyntheticDevice(NEAR), []
        for _ in range(8):
            seen.append(race.next_block())
            assert race.next_block() == seen[-1]  # asking again changes nothing
            race.record({name: device.time(name) for name in seen[-1]})
        return seen

    seen = orders(3)
    assert all(sorted(order) == sorted(NEAR) for order in seen)
    assert len(set(seen)) > 4
    assert seen == orders(3)
    assert seen != orders(4)


def test_every_position_in_a_block_is_as_likely_for_everyone():
    race, device = Race(list(NEAR), policy=RacePolicy(rounds=(300,))), SyntheticDevice(NEAR)
    positions = dict.fromkeys(NEAR, 0)
    for _ in range(300):
        order = race.next_block()
        for position, name in enumerate(order):
            positions[name] += position
        race.record({name: device.time(name) for name in order})
    assert all(abs(total / 300 - 2.0) < 0.35 for total in positions.values())  # 4 standard errors


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_time_names_its_candidate_and_leaves_the_race_as_it_was(seconds):
    race = Race(["a", "b"])
    before = race.export()
    with pytest.raises(TimingError, match="'b'"):
        race.record({"a": 1 * US, "b": seconds})
    with pytest.raises(TimingError, match="'sentinel'"):
        race.record({"a": 1 * US, "b": 1 * US}, sentinel_s=seconds)
    assert race.export() == before


def test_a_block_must_be_complete():
    race = Race(["a", "b"])
    for times in ({"a": 1 * US}, {"a": 1 * US, "b": 1 * US, "c": 1 * US}, {}):
        with pytest.raises(RaceError, match="exactly"):
            race.record(times)


def test_names_are_checked():
    with pytest.raises(ValueError, match="unique"):
        Race(["a", "a"])
    with pytest.raises(UnknownNameError):
        Race(["a"], protected=("b",))


# -- elimination and stopping ---------------------------------------------------------------------------------


def test_clear_losers_leave_early_and_the_close_ones_are_measured_longest():
    race = run(Race(list(FIELD), ("default",), seed=1), SyntheticDevice(FIELD, seed=1))
    counts = {name: len(race.table.seconds(name)) for name in FIELD}
    assert counts["d"] == 5
    assert counts["a"] == counts["b"] == len(race.table) >= 15
    assert race.eliminated["d"].code is RejectCode.SLOW
    assert "slower than" in race.eliminated["d"].reason
    assert "a" in race.survivors


def test_a_single_candidate_needs_no_race():
    assert Race(["a"]).stop is Stop.PROVEN
    with pytest.raises(RaceError, match="over"):
        Race(["a"]).next_block()


def test_a_proven_leader_ends_the_race():
    times = {"a": 100 * US, "b": 140 * US, "c": 150 * US}
    race = run(Race(list(times), seed=1), SyntheticDevice(times, seed=1))
    assert race.stop is Stop.PROVEN
    assert race.survivors == ("a",)
    assert len(race.table) <= 15
    with pytest.raises(RaceError, match="over"):
        race.record({"a": 1 * US})


def test_the_race_ends_when_nobody_can_unseat_the_holder():
    times = {"a": 99.5 * US, "b": 100.5 * US, "default": 100 * US}
    race = run(Race(list(times), ("default",), seed=1), SyntheticDevice(times, seed=1))
    assert race.stop is Stop.SETTLED
    assert len(race.table) < 75


def test_the_race_ends_when_only_ties_are_left():
    race = run(Race(list(NEAR), seed=1), SyntheticDevice(NEAR, Noise(sigma=0.002), seed=1))
    assert race.stop is Stop.SETTLED
    assert "n0" in race.survivors


def test_an_open_question_ends_with_the_blocks():
    times = {"a": 101 * US, "b": 100 * US}  # on the edge of the tie
    race = run(Race(list(times), seed=1), SyntheticDevice(times, seed=1))
    assert race.stop is Stop.BLOCKS
    assert len(race.table) == RacePolicy().max_blocks


def test_a_difference_within_the_indifference_zone_eliminates_nobody():
    times = {"a": 100 * US, "b": 100.4 * US}
    device = SyntheticDevice(times, Noise(sigma=0.0005, outlier_rate=0.0), seed=1)
    race = run(Race(list(times), policy=RacePolicy(rounds=(5, 10, 20))), device)
    assert race.survivors == ("a", "b")
    clear = {"edge": 101 * US, "a": 100 * US, "b": 100.7 * US}  # whether the first is a tie keeps it going
    device = SyntheticDevice(clear, Noise(sigma=0.0005, outlier_rate=0.0), seed=1)
    assert "b" in run(Race(list(clear)), device).eliminated


def test_what_the_final_choice_would_forgive_is_no_reason_to_leave():
    """0.8 % slower: out if it comes after the leader, a tie if before; 2 % slower: forgiven to the holder only."""
    quiet = Noise(sigma=0.0005, outlier_rate=0.0)
    times = {"before": 100.8 * US, "lead": 100 * US, "after": 100.8 * US}
    assert run(Race(list(times)), SyntheticDevice(times, quiet)).survivors == ("before", "lead")
    times = {"first": 102 * US, "lead": 100 * US}
    assert run(Race(list(times)), SyntheticDevice(times, quiet)).survivors == ("lead",)
    assert run(Race(list(times), ("first",)), SyntheticDevice(times, quiet)).survivors == ("first", "lead")
    times = {"first": 104 * US, "lead": 100 * US}
    assert run(Race(list(times), ("first",)), SyntheticDevice(times, quiet)).survivors == ("lead",)


def test_a_difference_below_the_clock_is_never_proven():
    """On a clock of 0.5 us, 10.3 and 10.2 us read 10.5 and 10.0 every time: 5 %, and no evidence at all."""
    times = {"default": 10.3 * US, "b": 10.2 * US}
    noise = Noise(sigma=0.001, outlier_rate=0.0, quantum_s=0.5 * US)
    trusting = run(Race(list(times), ("default",)), SyntheticDevice(times, noise, seed=1))
    assert trusting.survivors == ("b",)
    coarse = run(Race(list(times), ("default",), resolution=0.05), SyntheticDevice(times, noise, seed=1))
    assert coarse.survivors == ("default", "b")
    assert select(coarse.result(), default="default").winner == "default"


def test_the_best_is_eliminated_no_oftener_than_stated():
    """Eight equal candidates that any elimination would wrong (indifference 0): at most 1 % of races err."""
    times = {f"c{i}": 100 * US for i in range(8)}
    policy = RacePolicy(rounds=(5, 10, 20), indifference=0.0)
    promotion = PromotionPolicy(tie=0.0)
    wrong = 0
    for seed in range(150):
        race = Race(list(times), policy=policy, promotion=promotion, seed=seed)
        wrong += bool(run(race, SyntheticDevice(times, Noise(drift=0.05), seed=seed)).eliminated)
    assert wrong <= 4  # 1.5 expected at the stated significance


def test_rare_tenfold_outliers_neither_eliminate_nor_favour_a_candidate():
    times = {"spiky": 100 * US, "steady": 104 * US, "slower": 108 * US}
    spiky = Noise(spikes={"spiky": (0.08, 10.0)})
    lucky = {"spiky": 104 * US, "steady": 100 * US, "slower": 108 * US}
    for seed in range(40):
        race = run(Race(list(times), seed=seed), SyntheticDevice(times, spiky, seed=seed))
        assert "spiky" in race.survivors
        assert select(race.result()).winner == "spiky"  # its mean is 172 us: an argmin of means never takes it
        race = run(Race(list(lucky), seed=seed), SyntheticDevice(lucky, spiky, seed=seed))
        assert select(race.result()).winner == "steady"


def test_racing_needs_far_fewer_samples_than_measuring_everyone():
    times = {f"c{i:02d}": (100 + 3 * i) * US for i in range(40)}
    trial = tune(SyntheticDevice(times, seed=5), list(times), default="c10", seed=5)
    assert trial.samples < 600
    assert trial.samples < 0.2 * 40 * RacePolicy().max_blocks


def test_the_wall_clock_cap_ends_the_race_but_not_before_the_minimum():
    times = {"a": 2.0, "b": 2.001}
    race = run(Race(list(times), policy=RacePolicy(wall_cap_s=10.0)), SyntheticDevice(times))
    assert race.stop is Stop.WALL
    assert len(race.table) == RacePolicy().min_blocks  # 4 s a block: the cap alone would have allowed 3
    quick = run(Race(list(NEAR), policy=RacePolicy(wall_cap_s=10.0)), SyntheticDevice(NEAR), wall_s=1.2)
    assert quick.stop is Stop.WALL
    assert len(quick.table) == 9
    assert quick.result().wall_s == pytest.approx(10.8)


# -- disturbed blocks -----------------------------------------------------------------------------------------


def test_a_disturbed_block_is_discarded_and_counted():
    race, device = Race(list(FIELD)), SyntheticDevice(FIELD)
    assert race.record({n: device.time(n) for n in race.next_block()})
    assert not race.record(dict.fromkeys(race.next_block(), 1 * US), disturbed=True)
    assert (len(race.table), race.discarded) == (1, 1)
    assert all(len(race.table.seconds(name)) == 1 for name in FIELD)


def test_a_sentinel_that_jumps_discards_its_block():
    race = Race(list(NEAR))
    sentinels = [20, 20.5, 19.8, 21.5, 20, 18.8, 20]
    kept = [race.record(NEAR, sentinel_s=s * US) for s in sentinels]
    assert kept == [True, True, True, False, True, False, True]
    assert (race.discarded, race.result().rebased) == (2, 0)


def test_a_sentinel_that_stays_on_a_new_level_is_the_new_baseline():
    race = Race(list(NEAR))
    kept = [race.record(NEAR, sentinel_s=s * US) for s in (20, 20, 23, 23, 23, 23, 23, 20)]
    assert kept == [True, True, False, False, False, True, True, False]
    assert race.result().rebased == 1


def test_slow_drift_is_no_disturbance():
    race = Race(["a", "b"], policy=RacePolicy(rounds=(200,)))
    for block in range(60):
        assert race.record({"a": 1 * US, "b": 1 * US}, sentinel_s=(20 + 0.1 * block) * US)


def test_a_restless_machine_ends_the_race():
    race = run(Race(list(FIELD)), SyntheticDevice(FIELD), disturbed=True)
    assert race.stop is Stop.DISTURBED
    assert race.discarded == RacePolicy().max_discarded
    assert len(race.table) == 0


# -- candidates that fail while racing ------------------------------------------------------------------------


def test_a_candidate_that_crashes_is_withdrawn_and_the_next_protected_holds():
    race, device = Race(list(FIELD), ("c", "default")), SyntheticDevice(FIELD)
    race.record({name: device.time(name) for name in race.next_block()})
    assert race.holder == "c"
    race.withdraw("c", Rejected(RejectCode.CRASH, "exit code -11"))
    assert race.holder == "default"
    assert race.result().withdrawn["c"].code is RejectCode.CRASH
    assert "c" not in race.next_block()
    with pytest.raises(RaceError, match="not racing"):
        race.withdraw("c", Rejected(RejectCode.CRASH, "again"))


def test_the_race_goes_on_with_those_the_withdrawn_leader_had_beaten():
    times = {"lead": 100 * US, "near": 100.2 * US, "b": 140 * US, "c": 141 * US}
    race, device = Race(list(times), seed=2), SyntheticDevice(times, seed=2)
    run(race, device, blocks=5)
    assert race.survivors == ("lead", "near")
    winner = "lead" if "than lead" in race.eliminated["b"].reason else "near"
    race.withdraw(winner, Rejected(RejectCode.CRASH, "exit code -11"))
    assert set(race.survivors) == {"lead", "near", "b", "c"} - {winner}
    assert select(run(race, device).result()).winner == ({"lead", "near"} - {winner}).pop()


def test_a_race_without_candidates_is_empty():
    race = Race(["a", "b"])
    race.withdraw("a", Rejected(RejectCode.TIMEOUT, "30 s"))
    assert race.stop is Stop.PROVEN
    assert Race([]).stop is Stop.EMPTY


# -- resumption -----------------------------------------------------------------------------------------------


def outcome(race):
    result = race.result()
    return (
        race.export(),
        result.survivors,
        result.eliminated,
        result.withdrawn,
        result.stop,
        result.discarded,
        result.rebased,
        result.wall_s,
        select(result, default="default").to_dict(),
    )


@pytest.mark.parametrize("interrupted_after", [0, 1, 4, 5, 6, 15, 33])
def test_a_resumed_race_is_the_uninterrupted_one(interrupted_after):
    """Through JSON text, with disturbed blocks, sentinels and a withdrawal among the events."""

    def play(race, rng, upto):
        while not race.finished and len(race.events) < upto:
            step = len(race.events)
            if step == 3:
                race.withdraw("d", Rejected(RejectCode.CRASH, "exit code -11"))
                continue
            clock = math.exp(0.01 * rng.standard_normal())
            times = {n: FIELD[n] * clock * math.exp(0.012 * rng.standard_normal()) for n in race.next_block()}
            sentinel = 20 * US * (1.2 if 8 <= step < 13 else 1.0)
            race.record(times, wall_s=0.01, sentinel_s=sentinel, disturbed=step == 6)

    whole, rng = Race(list(FIELD), ("default",), seed=11, resolution=0.001), np.random.default_rng(5)
    play(whole, rng, 10_000)
    assert whole.discarded >= 4  # the resumption has something to get wrong
    assert whole.result().rebased >= 1

    first, rng = Race(list(FIELD), ("default",), seed=11, resolution=0.001), np.random.default_rng(5)
    play(first, rng, interrupted_after)
    second = Race.restore(json.loads(json.dumps(first.export())))
    play(second, rng, 10_000)
    assert outcome(second) == outcome(whole)


def test_a_journal_of_single_events_restores_the_race():
    race, device = Race(list(FIELD), seed=2), SyntheticDevice(FIELD, seed=2)
    journal = [json.dumps({**race.export(), "events": []})]
    for _ in range(12):
        race.record({name: device.time(name) for name in race.next_block()})
        journal.append(json.dumps(race.events[-1]))
    header, *events = map(json.loads, journal)
    restored = Race.restore({**header, "events": events})
    assert restored.export() == race.export()
    assert restored.next_block() == race.next_block()


def test_exported_state_is_a_copy():
    race = Race(["a", "b"])
    race.record({"a": 1 * US, "b": 1 * US})
    race.export()["events"][0]["times"]["a"] = 0.0
    race.events[0]["times"]["a"] = 0.0
    assert race.export()["events"][0]["times"]["a"] == 1 * US


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("seed"),
        lambda s: s.update(version=99),
        lambda s: s.update(policy={"rounds": [5], "unheard_of": 1}),
        lambda s: s.update(promotion=None),
        lambda s: s["events"][0]["times"].update(a=math.nan),
        lambda s: s["events"][0]["times"].pop("a"),
        lambda s: s.update(events=[1]),
        lambda s: s.update(events=[{"withdraw": "a", "code": "no such code", "reason": ""}]),
    ],
)
def test_a_damaged_state_is_refused(damage):
    race = Race(["a", "b"])
    race.record({"a": 1 * US, "b": 1 * US})
    state = race.export()
    damage(state)
    with pytest.raises(RaceError):
        Race.restore(state)
