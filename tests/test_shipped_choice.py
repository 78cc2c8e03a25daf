"""Shipped tables in dispatch: what decides where nothing was tuned here, and what the decision says of it."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from isokern.autotune.candidates import admit
from isokern.autotune.contest import Standing
from isokern.autotune.policy import PromotionPolicy
from isokern.autotune.publish import Findings, make_entry
from isokern.autotune.race import RaceResult
from isokern.autotune.resume import Verdict
from isokern.autotune.samples import BlockTable
from isokern.autotune.select import select
from isokern.cache import CandidateRecord, Entry, Layer, Store
from isokern.cache.environment import Environment
from isokern.cache.sealed import SealedStore
from isokern.cache.silicon import CudaSilicon
from isokern.cache.store import CacheWarning
from isokern.registry import Accepted, Backend, Config, RejectCode, Rejected
from isokern.registry.backend import fingerprint_files
from isokern.registry.core import Registry
from isokern.registry.decision import Rule
from isokern.registry.doctor import examine
from isokern.registry.explain import explanation
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

OP = "fused_sigmoid_gating"
H100 = CudaSilicon("9.0", 132, 79)
H200 = CudaSilicon("9.0", 132, 141)
A100 = CudaSilicon("8.0", 108, 79)
HERE = Environment("cuda", H100, 0, "13.1", (("torch", "2.11.0"), ("triton", "3.8.0")), "3.12", (("product", "H100"),))
THERE = dataclasses.replace(HERE, driver="13.0", versions=(("torch", "2.11.0"), ("triton", "3.6.0")))
ON_H200 = dataclasses.replace(THERE, silicon=H200, labels=(("product", "H200"),))
ON_A100 = dataclasses.replace(THERE, silicon=A100, labels=(("product", "A100"),))
#: What other machines' toolchain makes of the fingerprints.
ELSEWHERE = "0" * 16


class Quick(Backend):
    """``source``: stands for the contents of its files."""

    op, name, provenance, priority = OP, "quick", "external", 5
    source = "as shipped"

    def check(self, problem):
        return Accepted()

    def configs(self, problem):
        return (Config.of(tile=1), Config.of(tile=2))

    def bind(self, problem, config):
        return lambda call: call.out

    def sources(self):
        return ()

    def toolchain(self):
        return {"compiler": "here", "source": self.source, "name": self.name}

    def source_fingerprint(self):
        return fingerprint_files((), {"source": self.source, "name": self.name})


class Steady(Quick):
    name = "steady"


class Plain(Quick):
    """First in the heuristic order."""

    name, priority = "plain", 90


def problem(*lengths, **changes):
    return describe(CaseSpec("made up", lengths, **changes), "cpu")


DECODE = problem(*(1,) * 16)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    made = Registry(load_plugins=False)
    for name in tuple(made.backends(OP)):
        made.unregister_backend(OP, name)
    for kind in (Quick, Steady, Plain):
        made.register_backend(kind())
    names = ("explicit", "user", "site", "shipped")
    made.use_store(Store([Layer(name, tmp_path / name, writable=name == "user") for name in names]))
    monkeypatch.setattr(made, "environment", lambda device: HERE)
    return made


def row(registry, name, us, tile=1, status="ok", code=None, samples=True, **changes):
    record = CandidateRecord(
        name, {"tile": tile}, status, code, None if code is None else "so it was", us,
        (us,) if us and samples else (), ELSEWHERE, source=registry.backends(OP)[name].source_fingerprint(),
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def slow(registry, name, us, **changes):
    return row(registry, name, us, status="rejected", code="slow", **changes)


def store(registry, layer, problem, *rows, environment=THERE):
    entry = Entry(
        op=OP, contract_version=registry.spec(OP).contract_version, key=problem.tuning_key(),
        environment=environment.hash, backend=rows[0].backend, config=dict(rows[0].config),
        rule=f"tuned on {environment.describe()}", candidates=rows, margin_over_runner_up=None,
        margin_over_default=None,
        measured={"policy": "eager", "created": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "isokern": "0",
                  "launches": 1, "method": "made up"},
    )  # fmt: skip
    [where] = [x for x in registry.store.layers if x.name == layer]
    path = where.write(entry, environment)
    registry.refresh()
    return path


def ship(registry, problem, *rows, environment=THERE):
    return store(registry, "shipped", problem, *rows, environment=environment)


def own(registry, layer, problem, name, tile=1):
    """Tuned in exactly this environment."""
    prints = registry.fingerprints(OP)
    record = CandidateRecord(name, {"tile": tile}, "ok", None, None, 1.0, (1.0,), prints[name])
    default = CandidateRecord("plain", {"tile": 1}, "rejected", "slow", "", 1.5, (1.5,), prints["plain"])
    return store(registry, layer, problem, record, default, environment=HERE)


def decide(registry, what=DECODE):
    return registry.dispatcher(OP).decide(what)


def choice(decision):
    return decision.rule, decision.backend, decision.config.get("tile")


def edit(registry, kind):
    """The backend with another source."""
    changed = type(kind.__name__, (kind,), {"source": "edited"})
    registry.register_backend(changed(), replace=True)


class TestThisSilicon:
    def test_a_table_made_with_other_versions_decides_and_the_decision_names_them(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0, tile=2))
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "quick", 2)
        assert found.detail == "shipped table of H100: tuned on H100"
        assert "shipped table of H100 was made with driver 13.0, here 13.1; triton 3.6.0, here 3.8.0" in found.notes
        assert any(note.startswith("not tuned in this environment: no entry in") for note in found.notes)

    @pytest.mark.parametrize(
        ("layer", "rule"),
        [("explicit", Rule.TUNED_USER), ("user", Rule.TUNED_USER), ("site", Rule.TUNED_SITE)],
    )
    def test_what_was_tuned_here_comes_first(self, registry, layer, rule):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        own(registry, layer, DECODE, "steady", tile=2)
        assert choice(decide(registry)) == (rule, "steady", 2)

    @pytest.mark.parametrize("layer", ["explicit", "user", "site"])
    def test_other_layers_are_looked_up_by_the_exact_environment_alone(self, registry, layer):
        store(registry, layer, DECODE, row(registry, "quick", 10.0), environment=THERE)
        assert decide(registry).rule is Rule.HEURISTIC

    def test_a_table_of_this_very_environment_needs_no_remark(self, registry):
        here = row(registry, "quick", 10.0, fingerprint=registry.fingerprint(OP, "quick"))
        ship(registry, DECODE, here, environment=HERE)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "quick", 1)
        assert found.notes == ("shipped table of H100 was made in this environment",)

    def test_nor_does_what_compiles_it_have_to_be_the_same(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), environment=HERE)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "quick", 1)
        assert "shipped table of H100 was made in this environment, but for what compiles it" in found.notes

    def test_another_contract_version_is_another_op(self, registry):
        path = ship(registry, DECODE, row(registry, "quick", 10.0))
        entry = dataclasses.replace(Entry.from_json(path.read_bytes()), contract_version=10**6)
        path.unlink()
        registry.store.layers[-1].write(entry, THERE)
        registry.refresh()
        assert decide(registry).rule is Rule.HEURISTIC

    def test_it_is_no_miss(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        registry.dispatcher(OP).resolve(DECODE)
        assert not registry.dispatcher(OP).misses

    def test_it_is_looked_up_once_per_problem(self, registry, monkeypatch):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        first = registry.dispatcher(OP).resolve(DECODE)
        monkeypatch.setattr(registry, "suggestions", None)
        assert registry.dispatcher(OP).resolve(DECODE) is first

    def test_a_broken_table_is_a_miss_with_one_warning(self, registry):
        path = ship(registry, DECODE, row(registry, "quick", 10.0))
        path.write_text("{")
        with pytest.warns(CacheWarning, match=path.name) as caught:
            rules = [decide(registry).rule for _ in range(3)]
        assert (rules, len(caught)) == ([Rule.HEURISTIC] * 3, 1)

    def test_ranks_that_have_agreed_use_none(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        registry.use_store(SealedStore(registry.store, None, "sealed"))
        assert decide(registry).rule is Rule.HEURISTIC


class TestNextBest:
    def rows(self, registry):
        return (
            row(registry, "quick", 10.0),
            slow(registry, "plain", 15.0),
            slow(registry, "steady", 12.0),
            slow(registry, "plain", 13.0, tile=2, samples=False),
        )

    def test_where_the_choice_has_changed_what_took_hardly_longer_runs(self, registry):
        ship(
            registry,
            DECODE,
            row(registry, "quick", 10.0),
            slow(registry, "plain", 15.0),
            slow(registry, "steady", 11.0),
        )
        edit(registry, Quick)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "steady", 1)
        assert found.detail == "shipped table of H100: the next best that runs here, which took 1.10 times as long"
        why = (
            "shipped table of H100: its choice quick[tile=1] does not apply: 'quick' has changed since it was measured"
        )
        assert why in found.notes

    def test_but_not_what_took_longer_for_the_changed_one_is_hardly_slower_now(self, registry):
        ship(registry, DECODE, row(registry, "plain", 10.0), slow(registry, "steady", 12.0))
        edit(registry, Plain)
        found = decide(registry)
        assert choice(found) == (Rule.HEURISTIC, "plain", 1)
        note = (
            "shipped table of H100: steady[tile=1] does not stand in for it, the next best that runs here, which took "
            "1.20 times as long"
        )
        assert note in found.notes

    def test_nor_does_the_heuristic_choice_where_the_table_knows_better(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        edit(registry, Quick)
        assert choice(decide(registry)) == (Rule.NEIGHBOUR, "steady", 1)

    def test_where_the_changed_one_declines_whatever_took_least_does(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        gone = {"source": "edited", "check": lambda self, problem: Rejected(RejectCode.ARCH, "too new a device")}
        registry.register_backend(type("Quick", (Quick,), gone)(), replace=True)
        assert choice(decide(registry)) == (Rule.TUNED_SHIPPED, "steady", 1)

    def test_a_changed_loser_changes_nothing(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        edit(registry, Steady)
        assert choice(decide(registry)) == (Rule.TUNED_SHIPPED, "quick", 1)

    def test_where_a_framework_is_missing(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        absent = type("Quick", (Quick,), {"requires": ("no_such_module",)})
        registry.register_backend(absent(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "steady", 1)
        assert any("needs no_such_module, which is not installed" in note for note in found.notes)

    def test_where_the_toolchain_of_a_missing_framework_has_no_version(self, registry):
        from importlib.metadata import PackageNotFoundError

        def toolchain(self):
            raise PackageNotFoundError("no_such_module")

        ship(registry, DECODE, *self.rows(registry))
        absent = type("Quick", (Quick,), {"requires": ("no_such_module",), "toolchain": toolchain})
        registry.register_backend(absent(), replace=True)
        assert choice(decide(registry)) == (Rule.TUNED_SHIPPED, "steady", 1)

    def test_where_the_choice_declines(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        declined = {"check": lambda self, problem: Rejected(RejectCode.ARCH, "too new a device")}
        registry.register_backend(type("Quick", (Quick,), declined)(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "steady", 1)
        assert any("too new a device" in note for note in found.notes)

    def test_where_its_config_is_not_offered_here_what_took_hardly_longer_runs(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), slow(registry, "steady", 11.0))
        narrow = {"configs": lambda self, problem: (Config.of(tile=2),)}
        registry.register_backend(type("Quick", (Quick,), narrow)(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "steady", 1)
        assert any("this config is not offered here" in note for note in found.notes)

    def test_a_backend_whose_configs_have_changed_is_not_left_for_a_much_slower_one(self, registry):
        ship(registry, DECODE, row(registry, "plain", 10.0), slow(registry, "steady", 900.0))
        other = {"configs": lambda self, problem: (Config.of(tile=3),), "source": "edited"}
        registry.register_backend(type("Plain", (Plain,), other)(), replace=True)
        assert choice(decide(registry)) == (Rule.HEURISTIC, "plain", 3)

    def test_where_it_is_not_registered(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        registry.unregister_backend(OP, "quick")
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "steady", 1)
        assert any("it is not registered" in note for note in found.notes)

    def test_first_calls_alone_count_for_a_quarter_more(self, registry):
        ship(registry, DECODE, *self.rows(registry))
        registry.unregister_backend(OP, "quick")
        edit(registry, Steady)
        assert choice(decide(registry)) == (Rule.TUNED_SHIPPED, "plain", 1)
        one = {"configs": lambda self, problem: (Config.of(tile=2),)}
        registry.register_backend(type("Plain", (Plain,), one)(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.TUNED_SHIPPED, "plain", 2)
        assert found.detail.endswith("which took 1.30 times as long, by its first calls alone")

    @pytest.mark.parametrize("code", ["wrong", "crash", "timeout", "not_repeatable", "impossible", "compile"])
    def test_never_what_was_found_wrong_or_broken_however_fast(self, registry, code):
        bad = row(registry, "steady", 1.0, status="rejected", code=code)
        ship(registry, DECODE, row(registry, "quick", 10.0), bad)
        edit(registry, Quick)
        found = decide(registry)
        assert (found.rule, found.backend) == (Rule.HEURISTIC, "plain")
        assert "shipped table of H100: nor does any other candidate that was timed there" in found.notes


class TestNearSizes:
    def test_what_was_tuned_here_for_a_size_near_comes_before_the_tables_near_ones(self, registry):
        ship(registry, problem(*(1,) * 32), row(registry, "quick", 10.0), slow(registry, "plain", 15.0))
        own(registry, "user", problem(*(1,) * 64), "steady", tile=2)
        found = decide(registry)
        assert choice(found) == (Rule.NEIGHBOUR, "steady", 2)

    def test_but_not_before_what_the_table_has_for_this_very_size(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        own(registry, "user", problem(*(1,) * 32), "steady", tile=2)
        assert decide(registry).rule is Rule.TUNED_SHIPPED

    def test_a_shipped_neighbour_decides_and_says_where_it_is_from(self, registry):
        ship(registry, problem(*(1,) * 32), row(registry, "quick", 10.0, tile=2), slow(registry, "plain", 15.0))
        found = decide(registry)
        assert choice(found) == (Rule.NEIGHBOUR, "quick", 2)
        assert found.detail.startswith("shipped table of H100: expected to lose 0.0 % to the best")
        assert any("triton 3.6.0, here 3.8.0" in note for note in found.notes)
        assert registry.dispatcher(OP).resolve(DECODE)
        assert registry.dispatcher(OP).misses[DECODE] == 1

    def test_rows_of_a_changed_source_say_nothing(self, registry):
        others = (slow(registry, "steady", 15.0), slow(registry, "plain", 20.0))
        ship(registry, problem(*(1,) * 32), row(registry, "quick", 10.0), *others)
        edit(registry, Quick)
        assert choice(decide(registry))[:2] == (Rule.NEIGHBOUR, "steady")


class TestOtherSilicon:
    def test_the_table_of_the_nearest_silicon_decides_and_is_named(self, registry):
        ship(registry, DECODE, row(registry, "steady", 10.0), environment=ON_A100)
        ship(registry, DECODE, row(registry, "quick", 10.0, tile=2), environment=ON_H200)
        found = decide(registry)
        assert choice(found) == (Rule.OTHER_SILICON, "quick", 2)
        assert found.detail == "shipped table of H200: tuned on H200"
        assert any("memory_gib 141, here 79" in note for note in found.notes)

    def test_it_still_counts_as_not_tuned(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), environment=ON_H200)
        registry.dispatcher(OP).resolve(DECODE)
        assert registry.dispatcher(OP).misses[DECODE] == 1

    def test_anything_of_this_silicon_comes_first(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), environment=ON_H200)
        own(registry, "user", problem(*(1,) * 64), "steady")
        assert choice(decide(registry))[:2] == (Rule.NEIGHBOUR, "steady")
        ship(registry, DECODE, row(registry, "plain", 10.0, tile=2))
        assert choice(decide(registry)) == (Rule.TUNED_SHIPPED, "plain", 2)

    def test_the_sizes_near_it_in_that_table_speak_where_it_lacks_this_one(self, registry):
        near = (row(registry, "quick", 10.0), slow(registry, "plain", 15.0))
        ship(registry, problem(*(1,) * 32), *near, environment=ON_H200)
        found = decide(registry)
        assert choice(found) == (Rule.OTHER_SILICON, "quick", 1)
        assert found.detail.startswith("shipped table of H200: expected")

    def test_another_major_compute_capability_serves_if_the_backend_accepts_here(self, registry):
        rows = (row(registry, "quick", 10.0), slow(registry, "steady", 12.0))
        ship(registry, DECODE, *rows, environment=ON_A100)
        assert choice(decide(registry)) == (Rule.OTHER_SILICON, "quick", 1)
        declined = {"check": lambda self, problem: Rejected(RejectCode.ARCH, "compute capability 8 only")}
        registry.register_backend(type("Quick", (Quick,), declined)(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.OTHER_SILICON, "steady", 1)
        assert any("compute capability 8 only" in note for note in found.notes)

    def test_what_is_known_to_lose_here_does_not_serve(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), slow(registry, "steady", 12.0), environment=ON_H200)
        hopeless = {"hopeless": lambda self, problem: "slow on this device"}
        registry.register_backend(type("Quick", (Quick,), hopeless)(), replace=True)
        found = decide(registry)
        assert choice(found) == (Rule.OTHER_SILICON, "steady", 1)
        assert any("known to lose here" in note for note in found.notes)

    def test_another_kind_of_device_says_nothing(self, registry, monkeypatch):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        from isokern.cache.silicon import CpuSilicon

        cpu = Environment("cpu", CpuSilicon("x86_64", 8, ()), 8, "", (("torch", "2.11.0"),), "3.12")
        monkeypatch.setattr(registry, "environment", lambda device: cpu)
        assert decide(registry).rule is Rule.HEURISTIC


class TestSources:
    def test_versions_of_a_toolchain_change_the_fingerprint_and_not_its_source_part(self, tmp_path):
        class Compiled(Quick):
            versions = "1"
            path = tmp_path / "kernel.cu"

            def sources(self):
                return (self.path,)

            def toolchain(self):
                return {"compiler": self.versions}

            source_fingerprint = Backend.source_fingerprint

        Compiled.path.write_text("one")
        backend = Compiled()
        whole, part = backend.fingerprint(), backend.source_fingerprint()
        Compiled.versions = "2"
        assert (backend.fingerprint() != whole, backend.source_fingerprint() == part) == (True, True)
        Compiled.path.write_text("two")
        assert backend.source_fingerprint() != part

    @pytest.mark.parametrize("name", ["triton", "cupy", "numba_cuda", "cupy_chunked", "triton_chunked"])
    def test_how_all_kernels_are_launched_changes_the_fingerprint_and_not_its_source_part(self, name, tmp_path):
        from isokern.backends import launch

        backend = Registry(load_plugins=False).backends(OP)[name]
        shared, own = tmp_path / "launcher.py", tmp_path / "kernel.cu"
        own.write_text("one")
        assert set(backend.shared_sources()) == set(launch.sources()) < set(backend.sources())

        class Edited(type(backend)):
            def sources(self):
                return (own, shared)

            def shared_sources(self):
                return (shared,)

        prints = []
        for text in ("one", "two"):
            shared.write_text(text)
            prints.append((Edited().fingerprint(), Edited().source_fingerprint()))
        (whole, part), (whole_after, part_after) = prints
        assert whole_after != whole
        assert part_after == part
        own.write_text("two")
        assert Edited().source_fingerprint() != part

    def test_that_of_a_composite_changes_with_the_source_of_its_parts_and_with_no_version(self):
        from isokern.backends.composite.backend import Composite

        part = Quick()
        both = Composite(lambda: {"quick": part})
        before = both.source_fingerprint()
        part.toolchain = lambda: {"compiler": "another"}
        assert both.source_fingerprint() == before
        part.source = "edited"
        assert both.source_fingerprint() != before

    def test_the_tuner_records_it(self, registry):
        admission = admit(registry, OP, DECODE)
        table = BlockTable()
        for _ in range(5):
            table.append({c.name: 1e-6 for c in admission.candidates})
        names = tuple(c.name for c in admission.candidates)
        raced = RaceResult(names, None, names, {}, {}, table, None, 0, 0, 1.0, PromotionPolicy())
        standing = Standing(None, raced, {}, 1, "made up")
        verdicts = dict.fromkeys(names, Verdict(None))
        selection = select(raced, incumbent=None, default=admission.default)
        findings = Findings(admission, verdicts, standing, {}, selection)
        entry = make_entry(findings, OP, 1, DECODE.tuning_key(), HERE.hash, "eager", 1.0)
        expected = {name: backend.source_fingerprint() for name, backend in registry.backends(OP).items()}
        assert {c.backend: c.source for c in entry.candidates} == expected


def shown(registry, what=DECODE):
    out = io.StringIO()
    console = Console(file=out, width=200, color_system=None)
    for part in explanation(decide(registry, what), registry, what):
        console.print(part, markup=False, highlight=False)
    return out.getvalue()


class TestShown:
    def test_explain_shows_the_tables_candidates(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), slow(registry, "steady", 12.0))
        text = shown(registry)
        assert "rule: tuned-shipped (shipped table of H100: tuned on H100)" in text
        assert "tuned choice: quick[tile=1]: tuned on H100" in text
        assert "1.20x" in text
        assert "does not count" not in text

    def test_explain_says_what_in_the_table_no_longer_counts(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), slow(registry, "steady", 10.5))
        edit(registry, Quick)
        assert "does not count: 'quick' has changed since" in shown(registry)

    def test_explain_shows_those_of_other_silicon(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0), environment=ON_H200)
        text = shown(registry)
        assert "rule: other-silicon (shipped table of H200" in text
        assert "tuned candidates" in text

    def test_doctor_counts_the_tables(self, registry):
        ship(registry, DECODE, row(registry, "quick", 10.0))
        ship(registry, DECODE, row(registry, "quick", 10.0), environment=ON_H200)
        (item,) = [i for i in examine(registry) if (i.topic, i.name) == ("store", "shipped")]
        assert item.state == "ok"
        assert "; H100: 1 entries" in item.text
        assert "; H200: 1 entries" in item.text
