"""What was tuned for batches of about this size serves one that nothing was tuned for, where it is offered there."""

from __future__ import annotations

import math

import pytest

from isokern.cache import CandidateRecord, Entry, Layer, Store
from isokern.cache.found import Located
from isokern.cache.neighbours import FARTHEST, neighbours
from isokern.cache.sealed import SealedStore
from isokern.registry import Accepted, Backend, Config
from isokern.registry.core import Registry
from isokern.registry.decision import Rule
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

OP = "fused_sigmoid_gating"
MEASURED = {
    "policy": "eager",
    "created": "2026-01-01T00:00:00+00:00",
    "seconds": 1.0,
    "isokern": "0",
    "launches": 1,
    "method": "made up",
}
SIZES = ("n", "tokens", "longest", "length_class")


class Tiled(Backend):
    """Its largest tile is offered for several tokens only."""

    op, name, provenance, priority = OP, "tiled", "external", 5

    def check(self, problem):
        return Accepted()

    def configs(self, problem):
        tiles = (1, 2) if problem.profile.longest == 1 else (1, 2, 4)
        return tuple(Config.of(tile=tile) for tile in tiles)

    def bind(self, problem, config):
        return lambda call: call.out


class First(Tiled):
    name, priority = "first", 90


def problem(*lengths, **changes):
    return describe(CaseSpec("made up", lengths, **changes), "cpu")


@pytest.fixture
def registry(tmp_path):
    made = Registry(load_plugins=False)
    for name in tuple(made.backends(OP)):
        made.unregister_backend(OP, name)
    made.register_backend(Tiled())
    made.register_backend(First())
    made.use_store(Store([Layer("explicit", tmp_path, writable=True)]))
    return made


def tune(registry, problem, tile, fingerprint=None, **losers):
    """``losers``: microseconds by backend, which runs with a tile of 1; the winner takes one."""
    environment = registry.environment("cpu")
    spec = registry.spec(OP)
    record = CandidateRecord(
        "tiled", {"tile": tile}, "ok", median_us=1.0, samples_us=(1.0,),
        fingerprint=fingerprint or registry.fingerprint(OP, "tiled"),
    )  # fmt: skip
    others = tuple(
        CandidateRecord(
            name, {"tile": 1}, "ok", median_us=us, samples_us=(us,), fingerprint=registry.fingerprint(OP, name)
        )
        for name, us in losers.items()
    )
    entry = Entry(
        op=OP, contract_version=spec.contract_version, key=problem.tuning_key(), environment=environment.hash,
        backend="tiled", config={"tile": tile}, rule="made up", candidates=(record, *others),
        margin_over_runner_up=None, margin_over_default=None,
        measured=MEASURED,
    )  # fmt: skip
    registry.store.put(entry, environment)
    registry.refresh()


def decide(registry, problem):
    return registry.dispatcher(OP).decide(problem)


DECODE_16 = problem(*(1,) * 16)


class TestDecision:
    def test_without_neighbours_the_heuristic_order_decides(self, registry):
        tune(registry, problem(*(1,) * 16, k=96), 2)  # another K is no neighbour
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC

    def test_the_nearest_batch_decides(self, registry):
        tune(registry, problem(*(1,) * 64), 1)
        tune(registry, problem(*(1,) * 8), 2, first=2.0)
        found = decide(registry, DECODE_16)
        assert (found.rule, found.backend, found.config) == (Rule.NEIGHBOUR, "tiled", {"tile": 2})
        assert "n 8 for 16" in found.detail
        assert "n 64 for 16" not in found.detail, "it does not know that tile"
        assert any("not tuned" in note for note in found.notes)

    def test_who_knows_nothing_of_the_heuristic_choice_has_nothing_to_hold_against_it(self, registry):
        tune(registry, problem(*(1,) * 8), 2)
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC

    def test_between_two_sizes_runs_what_loses_least_at_both(self, registry):
        tune(registry, problem(*(1,) * 64), 2, first=1.05)
        tune(registry, problem(*(1,) * 4), 1, first=1.5)
        tune(registry, problem(*(1,) * 8), 1, first=1.01)
        found = decide(registry, DECODE_16)
        assert (found.rule, found.backend) == (Rule.NEIGHBOUR, "tiled")
        tune(registry, problem(*(1,) * 4), 2, first=0.5)
        tune(registry, problem(*(1,) * 8), 2, first=0.9)
        found = decide(registry, DECODE_16)
        assert (found.rule, found.backend, found.config) == (Rule.NEIGHBOUR, "first", {"tile": 1})
        assert "by 3 batches like it" in found.detail
        assert {f"n {n} for 16" in found.detail for n in (4, 8, 64)} == {True}

    def test_the_heuristic_choice_stays_where_the_winner_promises_hardly_more(self, registry):
        tune(registry, problem(*(1,) * 8), 2, first=1.005)
        found = decide(registry, DECODE_16)
        assert (found.rule, found.backend) == (Rule.NEIGHBOUR, "first")
        assert "expected to lose 0.5 % to the best, the heuristic choice 0.5 %" in found.detail

    def test_a_backend_that_is_known_to_lose_at_this_size_does_not_serve_it(self, registry):
        tune(registry, problem(*(1,) * 8), 2)
        registry.unregister_backend(OP, "tiled")
        registry.register_backend(Hopeless())
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC

    def test_what_was_tuned_for_this_very_size_comes_first(self, registry):
        tune(registry, problem(*(1,) * 8), 2)
        tune(registry, DECODE_16, 1)
        found = decide(registry, DECODE_16)
        assert (found.rule, found.config) == (Rule.TUNED_USER, {"tile": 1})

    def test_one_token_per_sequence_is_near_no_other_length(self, registry):
        tune(registry, problem(*(2,) * 16), 2)
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC

    def test_a_config_that_is_not_offered_for_this_size_does_not_serve_it(self, registry):
        tune(registry, problem(*(4,) * 16), 4, first=2.0)
        assert decide(registry, problem(*(8,) * 16)).config == {"tile": 4}
        registry.unregister_backend(OP, "tiled")
        registry.register_backend(Narrow())
        assert decide(registry, problem(*(8,) * 16)).backend == "first"

    def test_a_backend_that_changed_since_does_not_serve(self, registry):
        tune(registry, problem(*(1,) * 8), 2, fingerprint="another")
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC

    def test_it_still_counts_as_not_tuned(self, registry):
        tune(registry, problem(*(1,) * 8), 2)
        dispatcher = registry.dispatcher(OP)
        dispatcher.resolve(DECODE_16)
        assert dispatcher.misses[DECODE_16] == 1

    def test_ranks_that_have_agreed_look_at_no_neighbours(self, registry):
        tune(registry, problem(*(1,) * 8), 2)
        registry.use_store(SealedStore(registry.store, None, "sealed"))
        assert decide(registry, DECODE_16).rule is Rule.HEURISTIC


class Narrow(Tiled):
    def configs(self, problem):
        return (Config.of(tile=1),)

    def fingerprint(self):
        return Tiled().fingerprint()


class Hopeless(Tiled):
    def hopeless(self, problem):
        return "slow"

    def fingerprint(self):
        return Tiled().fingerprint()


def located(**key):
    base = {"op": "x", "n": 16, "tokens": 64, "longest": 4, "length_class": "uniform"}
    record = CandidateRecord("b", {}, "ok", median_us=1.0, samples_us=(1.0,))
    entry = Entry(
        op="x", contract_version=1, key={**base, **key}, environment="e" * 16, backend="b", config={}, rule="r",
        candidates=(record,), margin_over_runner_up=None, margin_over_default=None,
        measured=MEASURED,
    )  # fmt: skip
    return Located(entry, None, None, None)


KEY = {"op": "x", "n": 16, "tokens": 64, "longest": 4, "length_class": "uniform"}


class TestDistance:
    def order(self, *keys):
        return [n.located.entry.key for n in neighbours([located(**k) for k in keys], KEY, SIZES)]

    def test_the_longest_counts_twice_as_much_as_tokens_or_sequences(self):
        found = neighbours([located(longest=8), located(tokens=128), located(n=32)], KEY, SIZES)
        assert [near.away for near in found] == [0.5, 0.5, 1.0]

    def test_doublings_of_all_counts_add_up(self):
        near, far = {"n": 32, "tokens": 128}, {"tokens": 512}
        assert [k["tokens"] for k in self.order(far, near)] == [128, 512]
        assert neighbours([located(**near, longest=1)], {**KEY, "longest": 1}, SIZES)[0].away == 1.0, "in decode"

    def test_beyond_the_farthest_nothing_is_near(self):
        assert FARTHEST == 4.0
        assert self.order({"longest": 64})
        assert not self.order({"longest": 65})

    def test_another_class_of_lengths_weighs_two_doublings(self):
        found = self.order({"length_class": "heavy"}, {"longest": 8}, {"longest": 32})
        assert [(k["length_class"], k["longest"]) for k in found] == [("uniform", 8), ("heavy", 4), ("uniform", 32)]

    def test_a_length_that_is_not_known_is_near_those_that_are(self):
        key = {name: value for name, value in KEY.items() if name != "longest"}
        assert len(neighbours([located()], key, SIZES)) == 1

    def test_one_token_is_infinitely_far_from_several(self):
        assert not self.order({"longest": 1})
        assert math.isfinite(FARTHEST)

    def test_fields_that_are_no_sizes_must_be_equal(self):
        assert not self.order({"op": "y"})
