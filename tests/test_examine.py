"""Who is called, who is gated and who is spared both, given what is known from another launch mode."""

from __future__ import annotations

import pytest

from isokern.autotune.candidates import Candidate
from isokern.autotune.examine import Examiner, GatePolicy
from isokern.autotune.policy import TunePolicy
from isokern.autotune.progress import Progress
from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.resume import Resume, Verdict
from isokern.autotune.worker import CandidateFailure, Limits
from isokern.cache.journal import Journal
from isokern.registry import Config
from isokern.registry.decision import RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec

TINY = CaseSpec("tiny", (3, 5), h=1, hv=2, k=8, v=8)
KEY = {"N": 2}
PROVEN = Verdict(None, ("conformant", "repeatable"), 1e-6)


class Worker:
    """Answers as a worker would, with given times; notes what it is asked."""

    alive, pid, limits = True, 1, Limits()

    def __init__(self, seconds, least_s=None, broken=()):
        self.seconds, self.least_s, self.broken = seconds, least_s or {}, broken
        self.asked = []

    def request(self, do, limit_s, **arguments):
        name = arguments.get("name")
        if name is not None:
            self.asked.append((do, name.partition("[")[0]))
        match do:
            case "load":
                return {"key": KEY}
            case "bind":
                return {"fingerprint": "0" * 16}
            case "first_call" if name in self.broken:
                raise CandidateFailure(Rejected(RejectCode.RAISED, "it cannot"))
            case "first_call":
                return {"seconds": [self.seconds[name]], "least_s": self.least_s.get(name)}
            case "gate":
                return {"code": None, "reason": "", "repeatable": True, "peak_bytes": None}
        return {}

    def of(self, do):
        return [name for asked, name in self.asked if asked == do]

    def kill(self):
        pass


@pytest.fixture
def examine(tmp_path):
    """Verdicts on candidates of these times, by the backend's name; and the worker."""

    def examine(seconds, *, proven=(), least_s=None, protected=(), **answers):
        candidates = {name: Candidate(name, Config(), "0" * 16) for name in seconds}
        worker = Worker(
            {candidates[name].name: s for name, s in seconds.items()},
            {candidates[name].name: s for name, s in answers.get("found", {}).items()},
            [candidates[name].name for name in answers.get("broken", ())],
        )
        examiner = Examiner(
            worker,
            ProblemRecipe("op", TINY, TINY, "hooks", device="cuda"),
            KEY,
            GatePolicy(hopeless_ratio=2.0),
            TunePolicy(),
            Resume(Journal(tmp_path / "journal.jsonl"), "signature"),
            Progress(),
            [candidates[name].name for name in protected],
        )
        verdicts = examiner.examine(
            list(candidates.values()),
            proven={candidates[name].name: PROVEN for name in proven},
            least_s={candidates[name].name: s for name, s in (least_s or {}).items()},
        )
        worker.least_found = examiner.least_s
        return {c.backend: verdicts[c.name] for c in candidates.values()}, worker

    return examine


def test_what_was_proven_in_another_launch_mode_is_timed_anew_and_not_gated(examine):
    verdicts, worker = examine({"new": 1.1e-3, "known": 1e-3}, proven=["known"])
    assert worker.of("first_call") == ["known", "new"]
    assert worker.of("gate") == ["new"]
    assert verdicts["known"] == Verdict(None, PROVEN.tags, 1e-3)


def test_its_time_spares_the_gate_to_those_that_are_hopeless_beside_it(examine):
    verdicts, worker = examine({"slow": 2.1e-3, "known": 1e-3}, proven=["known"])
    assert worker.of("gate") == []
    assert verdicts["slow"].rejected.code is RejectCode.SLOW
    assert "2.1x the best that is proven" in verdicts["slow"].rejected.reason


def test_it_counts_among_the_faster_ones_that_are_proven(examine):
    known = {f"known {i}": 1e-3 for i in range(TunePolicy().screen.keep + 1)}
    verdicts, worker = examine({"new": 1.1e-3, **known}, proven=known)
    assert worker.of("gate") == []
    assert "faster ones are proven already" in verdicts["new"].rejected.reason


def test_a_proof_from_another_launch_mode_excuses_no_failure_in_this_one(examine):
    verdicts, _ = examine({"known": 1e-3, "new": 1e-3}, proven=["known"], broken=["known"])
    assert verdicts["known"].rejected == Rejected(RejectCode.RAISED, "it cannot")
    assert verdicts["new"].proven


def test_one_that_takes_longer_in_graphs_than_the_best_takes_here_is_not_called(examine):
    verdicts, worker = examine({"slow": 1.0, "near": 1e-3, "known": 1e-3}, proven=["known"], least_s={"slow": 2.1e-3})
    assert ("bind", "slow") not in worker.asked
    assert worker.of("first_call") == ["known", "near"]
    assert (verdicts["slow"].rejected.code, verdicts["slow"].first_s) == (RejectCode.SLOW, None)
    assert verdicts["slow"].rejected.reason.startswith("not called: in graphs it takes 2.1 ms at least, 2.1x the best")


@pytest.mark.parametrize(
    ("seconds", "known", "protected"),
    [(1.9e-3, ["known"], []), (2.1e-3, [], []), (2.1e-3, ["known"], ["slow"])],
    ids=["near enough", "nobody is proven here", "protected"],
)
def test_else_it_is_called(examine, seconds, known, protected):
    _, worker = examine({"slow": 3e-3, "known": 1e-3}, proven=known, least_s={"slow": seconds}, protected=protected)
    assert "slow" in worker.of("first_call")


def test_what_is_found_about_graphs_is_told(examine):
    _, worker = examine({"a": 1e-3, "b": 1e-3}, found={"a": 0.9e-3})
    assert worker.least_found == {"a[default]": 0.9e-3}


def settings(backend, count):
    return [Candidate(backend, Config.of(setting=i), "0" * 16) for i in range(count)]


@pytest.fixture
def examine_settings(tmp_path):
    """Verdicts on candidates of these times (by name), some of them proven by graph; and the worker."""

    def examine(candidates, seconds, *, device="cuda", proven=(), by_graph=None, broken=(), protected=()):
        worker = Worker({c.name: seconds[c.name] for c in candidates}, broken=broken)
        examiner = Examiner(
            worker,
            ProblemRecipe("op", TINY, TINY, "hooks", device=device),
            KEY,
            GatePolicy(hopeless_ratio=2.0, behind_ratio=2.5, settings=2),
            TunePolicy(),
            Resume(Journal(tmp_path / "settings.jsonl"), "signature"),
            Progress(),
            protected,
        )
        verdicts = examiner.examine(candidates, dict.fromkeys(proven, PROVEN), by_graph=by_graph)
        reasons = {name: v.rejected.reason for name, v in verdicts.items() if v.rejected is not None}
        uncalled = [c.name for c in candidates if reasons.get(c.name, "").startswith("not called")]
        return verdicts, uncalled, worker

    return examine


class TestSettingsOfOneBackend:
    """The default of each backend is called first."""

    ahead, behind = settings("ahead", 2), settings("behind", 3)
    names = tuple(c.name for c in behind)

    def times(self, *behind):
        return {c.name: 1e-3 for c in self.ahead} | dict(zip(self.names, behind, strict=True))

    def test_they_are_not_called_where_its_default_is_far_behind(self, examine_settings):
        verdicts, uncalled, worker = examine_settings([*self.behind, *self.ahead], self.times(2.6e-3, 1e-3, 1e-3))
        assert worker.of("first_call")[:2] == ["behind", "ahead"]
        assert uncalled == list(self.names[1:])
        assert verdicts[self.names[2]].rejected.code is RejectCode.SLOW
        assert "behind takes 2.6 ms, 2.6x the best of all (1 ms)" in verdicts[self.names[2]].rejected.reason

    def test_they_are_called_where_it_is_not(self, examine_settings):
        assert not examine_settings([*self.behind, *self.ahead], self.times(2.4e-3, 1e-3, 1e-3))[1]

    def test_they_are_called_where_it_failed(self, examine_settings):
        times = self.times(9.0, 1e-3, 1e-3)
        assert not examine_settings([*self.behind, *self.ahead], times, broken=[self.names[0]])[1]

    def test_one_that_is_protected_is_called(self, examine_settings):
        times = self.times(2.6e-3, 2.6e-3, 1e-3)
        _, uncalled, _ = examine_settings([*self.behind, *self.ahead], times, protected=[self.names[1]])
        assert uncalled == [self.names[2]]

    def test_one_that_was_proven_in_another_launch_mode_is_called(self, examine_settings):
        times = self.times(2.6e-3, 2.6e-3, 1e-3)
        candidates = [*self.behind, *self.ahead]
        assert examine_settings(candidates, times, proven=self.names[:2])[1] == [self.names[2]]

    def test_on_a_cpu_nothing_is_known_of_that(self, examine_settings):
        assert not examine_settings([*self.behind, *self.ahead], self.times(2.6e-3, 1e-3, 1e-3), device="cpu")[1]

    def test_launched_eagerly_the_fastest_by_graph_are_called_besides_those_proven_there(self, examine_settings):
        five = settings("five", 5)
        by_graph = {c.name: s for c, s in zip(five, (3.0, 1.0, 2.0, 4.0, float("inf")), strict=True)}
        times = {c.name: 1e-3 for c in five}
        verdicts, uncalled, _ = examine_settings(five, times, proven=[five[3].name], by_graph=by_graph)
        assert uncalled == [five[0].name, five[4].name], "two others are faster than the first"
        assert "in graphs it takes 3 s, and 2 other settings less" in verdicts[five[0].name].rejected.reason
        assert "too slow" in verdicts[five[4].name].rejected.reason

    def test_one_that_is_new_since_then_is_called(self, examine_settings):
        five = settings("five", 5)
        by_graph = {c.name: float(i) for i, c in enumerate(five[:4], 1)}
        _, uncalled, _ = examine_settings(five, {c.name: 1e-3 for c in five}, by_graph=by_graph)
        assert uncalled == [five[2].name, five[3].name]
