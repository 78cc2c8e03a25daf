"""What candidates took at sizes near by says which of them to run at one between."""

from __future__ import annotations

import math

import pytest

from isokern.cache import CandidateRecord, Entry
from isokern.cache.found import Located
from isokern.cache.neighbours import Neighbour
from isokern.registry.decision import RejectCode
from isokern.registry.forecast import forecast, typical_us

MEASURED = {
    "policy": "graph",
    "created": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "isokern": "0",
    "launches": 1,
    "method": "made up",
}
PRINTS = dict.fromkeys("abcd", "f")


def raced(name, us, **changes):
    return CandidateRecord(name, {}, "ok", median_us=us, samples_us=(us, us), fingerprint="f", **changes)


def rejected(name, code, us=None, samples=()):
    return CandidateRecord(name, {}, "rejected", code, "why", us, samples, fingerprint="f")


def entry(winner, *records, n=8):
    return Entry(
        op="x", contract_version=1, key={"op": "x", "n": n}, environment="e" * 16, backend=winner, config={}, rule="r",
        candidates=records, margin_over_runner_up=None, margin_over_default=None, measured=MEASURED,
    )  # fmt: skip


def near(away, winner, *records, n=8):
    return Neighbour(Located(entry(winner, *records, n=n), None, None, None), away, {"n": (16, n)})


def chosen(*entries, default=None, offered="abcd", prints=PRINTS):
    found = forecast(entries, lambda record: record.backend in offered, default, prints)
    return None if found is None else found.record.backend


class TestChoice:
    def test_nothing_near_says_nothing(self):
        assert chosen() is None

    def test_of_one_entry_its_winner(self):
        assert chosen(near(1.0, "a", raced("a", 1.0), raced("b", 1.2))) == "a"

    def test_a_close_second_of_the_nearest_that_wins_farther_away_beats_one_that_fails_there(self):
        """A prompt of 313 tokens beside decode rows: at 256 a walking kernel is 5 % ahead, at 512 it takes twice."""
        nearest = near(1.5, "a", raced("a", 94.9), raced("b", 100.0))
        assert chosen(nearest) == "a"
        assert chosen(nearest, near(3.5, "b", raced("a", 95.1), raced("b", 49.5))) == "b"

    def test_the_nearer_an_entry_the_more_it_counts(self):
        one, two = [raced("a", 1.0), raced("b", 1.4)], [raced("a", 1.4), raced("b", 1.0)]
        assert chosen(near(1.0, "a", *one), near(2.0, "b", *two)) == "a"
        assert chosen(near(1.0, "b", *two), near(2.0, "a", *one)) == "b"

    def test_no_single_entry_outweighs_the_others_by_more_than_a_factor_of_two(self):
        far = near(2.0, "b", raced("a", 1000.0), raced("b", 1.0))
        assert chosen(near(1.0, "a", raced("a", 1.0), raced("b", 1.9)), far) == "a"

    def test_the_winner_stays_unless_another_promises_a_percent_per_doubling(self):
        """The tuner kept its default, for all that another was measured to be a little faster."""
        records = [raced("a", 1.015), raced("b", 1.0)]
        assert chosen(near(1.0, "a", *records)) == "b"
        assert chosen(near(2.0, "a", *records)) == "a"

    def test_so_does_the_default_and_before_any_winner(self):
        records = [raced("a", 1.0), raced("b", 1.005), raced("c", 1.005)]
        assert chosen(near(1.0, "a", *records), default="b[default]") == "b"
        assert chosen(near(1.0, "a", *records), default="c[default]") == "c"
        assert chosen(near(1.0, "a", raced("a", 1.0), raced("b", 1.5)), default="b[default]") == "a"

    def test_what_few_of_the_entries_know_does_not_count(self):
        entries = near(1.0, "a", raced("a", 1.05), raced("b", 1.0)), near(3.0, "c", raced("a", 1.5), raced("c", 1.0))
        assert chosen(*entries, offered="ac") == "a"
        assert chosen(*entries, offered="c") is None

    def test_nor_does_what_the_nearer_of_two_distant_ones_alone_knows(self):
        farther = near(2.5, "a", raced("a", 1.0))
        assert chosen(near(2.0, "c", raced("a", 1.5), raced("c", 1.0)), farther) == "a"
        assert chosen(near(1.0, "c", raced("a", 1.5), raced("c", 1.0)), farther) == "c", "it has most of the weight"

    def test_where_the_default_was_in_no_race_another_regime_begins(self):
        """Of 256 tokens a composite was put aside after its first calls; of 8192 it is the heuristic choice."""
        slow = CandidateRecord("b", {}, "rejected", "slow", "?", median_us=9.0, fingerprint="f")
        assert chosen(near(1.0, "a", raced("a", 1.0), slow), default="b[default]") is None
        assert chosen(near(1.0, "a", raced("a", 1.0)), default="b[default]") is None


class TestWhoMay:
    def test_what_is_not_offered_here_does_not_run(self):
        assert chosen(near(1.0, "a", raced("a", 1.0), raced("b", 1.5)), offered="b") == "b"

    def test_a_backend_that_changed_since_is_as_if_it_had_not_been_there(self):
        entries = near(1.0, "a", raced("a", 1.0), raced("b", 1.5))
        assert chosen(entries, prints={**PRINTS, "a": "another"}) == "b"
        assert chosen(entries, prints={}) is None

    @pytest.mark.parametrize("code", ["wrong", "crash", "not_repeatable", "compile"])
    def test_what_was_broken_at_one_size_runs_at_none_near_it(self, code):
        good = near(1.0, "a", raced("a", 1.0), raced("b", 1.5))
        assert chosen(good, near(2.0, "b", rejected("a", code), raced("b", 1.0))) == "b"

    def test_what_has_nowhere_been_through_the_gate_does_not_run(self):
        fast_but_unproven = rejected("b", "slow", 0.5)
        assert chosen(near(1.0, "a", raced("a", 1.0), fast_but_unproven), offered="b") is None

    def test_every_code_of_the_gate_counts_as_broken_and_those_of_predicates_do_not(self):
        good = near(1.0, "a", raced("a", 1.0), raced("b", 1.5))
        harmless = {
            code
            for code in RejectCode
            if chosen(good, near(2.0, "b", rejected("a", code.value), raced("b", 1.0))) == "a"
        }
        assert harmless == {
            "not_installed", "device", "arch", "dtype", "shape", "layout", "feature", "grad", "mode", "policy",
            "hopeless", "slow",
        }  # fmt: skip


class TestTimes:
    def test_first_calls_do_not_make_faster_than_the_race(self):
        times = typical_us(entry("a", raced("a", 10.0), raced("b", 12.0), rejected("c", "slow", 9.0)), PRINTS)
        assert times == {"a[default]": 10.0, "b[default]": 12.0, "c[default]": 12.0}

    def test_what_was_too_slow_to_be_called_takes_for_ever(self):
        times = typical_us(entry("a", raced("a", 10.0), rejected("b", "slow"), rejected("c", "wrong", 1.0)), PRINTS)
        assert times == {"a[default]": 10.0, "b[default]": math.inf}


def test_it_says_what_is_expected_and_by_which_entries():
    one = near(1.0, "a", raced("a", 1.0), raced("b", 1.1), n=8)
    two = near(2.0, "a", raced("a", 1.0), raced("b", 1.1), n=64)
    found = forecast([one, two], lambda record: True, "b[default]", PRINTS)
    assert found is not None
    assert found.text == (
        "expected to lose 0.0 % to the best, the heuristic choice 10.0 %, by 2 batches like it: "
        f"memory store's {one.located.entry.key_hash} (n 8 for 16); "
        f"memory store's {two.located.entry.key_hash} (n 64 for 16)"
    )
    assert found.by == (one, two)
