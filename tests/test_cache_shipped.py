"""Shipped tables: how they are made of a store, which of them speak of this machine, and which of their rows count."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings

import pytest
from typer.testing import CliRunner

from isokern.cache import cli
from isokern.cache.audit import check_layer
from isokern.cache.candidate import CandidateRecord
from isokern.cache.codec import seal
from isokern.cache.entry import Entry
from isokern.cache.environment import Environment
from isokern.cache.extract import MAX_SAMPLES, REASON_CHARACTERS, extract, without_strangers
from isokern.cache.found import Hit, Miss
from isokern.cache.layer import Layer
from isokern.cache.sealed import SealedStore
from isokern.cache.shipped import made_with, ranked, rebased, silicon_distance
from isokern.cache.shipping import Current, UnshippableError, ship
from isokern.cache.silicon import CpuSilicon, CudaSilicon
from isokern.cache.store import CacheWarning, Store
from isokern.errors import StoreError

H100 = CudaSilicon("9.0", 132, 79)
VERSIONS = (("cupy", "14.2.0 (cupy-cuda13x)"), ("torch", "2.11.0"), ("triton", "3.6.0"))
LABELS = (("kernel_module", "580.95.05"), ("product", "NVIDIA H100 80GB HBM3"))
THERE = Environment("cuda", H100, 0, "13.0", VERSIONS, "3.12", LABELS)
HERE = Environment("cuda", H100, 0, "13.1", (("torch", "2.11.0"), ("triton", "3.8.0")), "3.12")
KEY = {"K": 128, "N": 8, "policy": "graph"}
PRINTS = {"cupy": "c-full-here", "triton": "t-full-here", "torch": "x-full-here"}
SOURCES = {"cupy": "c-src", "triton": "t-src", "torch": "x-src"}
CURRENT = Current(1, PRINTS, SOURCES)


def row(backend="cupy", us=10.0, status="ok", code=None, reason=None, samples=3, source=None, **config):
    return CandidateRecord(
        backend, config, status, code, reason, us, tuple(us + i / 8 for i in range(samples)) if us else (),
        fingerprint=f"{backend}-full-there", source=f"{backend[0] if backend != 'torch' else 'x'}-src"
        if source is None else source, tags=("conformant",),
    )  # fmt: skip


def slow(backend, us, samples=3, reason="slower", **config):
    return row(backend, us, "rejected", "slow", reason, samples, **config)


def wrong(backend, reason="head 3 is off", **config):
    return dataclasses.replace(row(backend, None, "rejected", "wrong", reason, **config), tags=())


def entry(*rows, key=KEY, environment=THERE, created="2026-11-02T10:00:00+00:00", rule="12 % faster", isokern="0.1.0"):
    rows = rows or (row(), slow("triton", 11.0))
    return Entry(
        op="some_op", contract_version=1, key=dict(key), backend=rows[0].backend, config=dict(rows[0].config),
        margin_over_runner_up=0.1, margin_over_default=None, rule=rule, candidates=rows, environment=environment.hash,
        measured={"policy": "graph", "method": "events", "launches": 9, "seconds": 1.0, "created": created,
                  "isokern": isokern},
    )  # fmt: skip


def write(root, *entries, environment=THERE):
    layer = Layer("explicit", root)
    return [layer.write(e, environment) for e in entries]


def make(tmp_path, current=CURRENT, environment=""):
    def current_of(op):
        return current if op == "some_op" else None

    return ship(Layer("explicit", tmp_path / "store"), Layer("shipped", tmp_path / "tables"), current_of, environment)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def only_entry(root):
    (path,) = root.glob("v1/*/entries/*/*.json")
    return Entry.from_json(path.read_bytes())


class TestSilicon:
    def order(self, here, *there):
        return sorted(there, key=lambda silicon: silicon_distance(here, silicon))

    def test_the_compute_capability_comes_before_the_number_of_multiprocessors_and_those_before_memory(self):
        here = CudaSilicon("9.0", 132, 141)
        h20, h100, b200, ada = (
            CudaSilicon("9.0", 78, 141), CudaSilicon("9.0", 132, 79), CudaSilicon("10.0", 148, 178),
            CudaSilicon("8.9", 128, 141),
        )  # fmt: skip
        assert self.order(here, ada, b200, h20, h100) == [h100, h20, b200, ada]

    def test_minor_versions_of_one_major_are_nearer_than_another_major(self):
        assert self.order(CudaSilicon("8.6", 84, 24), CudaSilicon("9.0", 84, 24), CudaSilicon("8.0", 108, 40)) == [
            CudaSilicon("8.0", 108, 40), CudaSilicon("9.0", 84, 24)
        ]  # fmt: skip

    def test_the_same_one_is_no_distance_away(self):
        assert set(silicon_distance(H100, H100)) == {0.0}

    def test_a_cpu_says_nothing_of_another_architecture_or_of_a_gpu(self):
        x86, arm = CpuSilicon("x86_64", 8, ("avx2",)), CpuSilicon("aarch64", 8, ("sve",))
        assert silicon_distance(x86, arm) is None
        assert silicon_distance(x86, H100) is None
        assert silicon_distance(H100, CudaSilicon("new", 1, 1)) is None

    def test_instruction_sets_come_before_cores(self):
        here = CpuSilicon("x86_64", 8, ("avx2", "fma"))
        far, near = CpuSilicon("x86_64", 8, ("avx2",)), CpuSilicon("x86_64", 64, ("avx2", "fma"))
        assert self.order(here, far, near) == [near, far]


class TestLookup:
    def store(self, tmp_path, *tables):
        for environment, entries in tables:
            write(tmp_path / "tables", *entries, environment=environment)
        return Store([Layer("user", tmp_path / "user", writable=True), Layer("shipped", tmp_path / "tables")])

    def test_a_table_of_this_silicon_is_found_whatever_made_it_and_what_differs_is_named(self, tmp_path):
        store = self.store(tmp_path, (THERE, [entry()]))
        assert isinstance(store.get("some_op", 1, KEY, HERE, PRINTS), Miss), "exact matching stays exact"
        (table,) = store.tables(HERE)
        assert store.in_table(table, "some_op", 1, KEY).entry == entry()
        assert made_with(table.environment, HERE) == (
            "driver 13.0, here 13.1; cupy 14.2.0 (cupy-cuda13x), here none; triton 3.6.0, here 3.8.0"
        )

    def test_only_exactly_this_key_and_contract(self, tmp_path):
        store = self.store(tmp_path, (THERE, [entry()]))
        (table,) = store.tables(HERE)
        assert store.in_table(table, "some_op", 2, KEY) is None
        assert store.in_table(table, "some_op", 1, {**KEY, "N": 9}) is None
        with pytest.warns(CacheWarning, match="cannot look up a key"):
            assert store.in_table(table, "some_op", 1, {"N": float("nan")}) is None

    def test_other_layers_have_no_tables(self, tmp_path):
        write(tmp_path / "user", entry())
        layers = [Layer(name, tmp_path / "user", writable=name == "user") for name in ("explicit", "user", "site")]
        assert Store(layers).tables(HERE) == ()

    def test_the_nearest_comes_first_and_of_one_silicon_the_one_that_differs_least(self, tmp_path):
        h200 = dataclasses.replace(THERE, silicon=CudaSilicon("9.0", 132, 141))
        a100 = dataclasses.replace(THERE, silicon=CudaSilicon("8.0", 108, 79))
        like = dataclasses.replace(THERE, driver="13.1")
        cpu = Environment("cpu", CpuSilicon("x86_64", 8, ()), 8, "", (("torch", "2.11.0"),), "3.12")
        made = (a100, h200, THERE, like, cpu)
        store = self.store(tmp_path, *((e, [entry(environment=e)]) for e in made))
        assert [table.environment for table in store.tables(HERE)] == [like, THERE, h200, a100]

    def test_on_a_cpu_the_nearest_number_of_threads_comes_first(self, tmp_path):
        one = Environment("cpu", CpuSilicon("x86_64", 8, ()), 1, "", (("torch", "2.11.0"),), "3.12")
        eight = dataclasses.replace(one, threads=8, versions=(("torch", "2.12.0"),))
        store = self.store(tmp_path, (one, [entry(environment=one)]), (eight, [entry(environment=eight)]))
        four = dataclasses.replace(one, threads=4)
        assert [table.environment.threads for table in store.tables(four)] == [8, 1]

    def test_a_broken_entry_is_a_miss_with_one_warning(self, tmp_path):
        store = self.store(tmp_path, (THERE, [entry()]))
        (path,) = (tmp_path / "tables").glob("v1/*/entries/*/*.json")
        path.write_text(path.read_text()[:-20])
        (table,) = store.tables(HERE)
        with pytest.warns(CacheWarning, match=path.name) as caught:
            found = [store.in_table(table, "some_op", 1, KEY) for _ in range(3)]
        assert (found, len(caught)) == ([None] * 3, 1)

    def test_a_broken_manifest_is_no_table_and_one_warning(self, tmp_path):
        h200 = dataclasses.replace(THERE, silicon=CudaSilicon("9.0", 132, 141))
        store = self.store(tmp_path, (THERE, [entry()]), (h200, [entry(environment=h200)]))
        (tmp_path / "tables" / "v1" / THERE.hash / "manifest.json").write_text("{")
        with pytest.warns(CacheWarning, match="manifest") as caught:
            found = [table.environment for here in (HERE, THERE, HERE) for table in store.tables(here)]
        assert (found, len(caught)) == ([h200] * 3, 1)

    def test_nothing_is_read_twice(self, tmp_path, monkeypatch):
        store = self.store(tmp_path, (THERE, [entry()]))
        store.in_table(store.tables(HERE)[0], "some_op", 1, KEY)
        monkeypatch.setattr(Layer, "read_path", None)
        monkeypatch.setattr(Layer, "read_environment", None)
        monkeypatch.setattr(Layer, "environments", None)
        assert store.in_table(store.tables(HERE)[0], "some_op", 1, KEY) is not None

    def test_new_tables_are_seen_after_a_refresh(self, tmp_path):
        store = self.store(tmp_path)
        assert store.tables(HERE) == ()
        write(tmp_path / "tables", entry())
        store.refresh()
        assert len(store.tables(HERE)) == 1

    def test_ranks_that_have_agreed_look_at_no_tables(self, tmp_path):
        assert SealedStore(self.store(tmp_path, (THERE, [entry()])), None, "sealed").tables(HERE) == ()


class TestRows:
    def test_rows_count_by_their_source_whatever_compiled_them(self):
        found = rebased(entry(), PRINTS, SOURCES)
        assert [c.fingerprint for c in found.candidates] == ["c-full-here", "t-full-here"]

    def test_a_changed_source_makes_its_own_rows_stale_and_no_others(self):
        found = rebased(entry(row(), slow("triton", 11.0)), PRINTS, {**SOURCES, "cupy": "edited"})
        assert [c.backend for c in found.fresh_candidates(PRINTS)] == ["triton"]
        assert found.stale_backends(PRINTS) == ("cupy",)

    def test_without_a_source_part_the_whole_fingerprint_decides(self):
        old = entry(row(source=""), row("triton", 11.0, source=""))
        assert [c.backend for c in rebased(old, PRINTS, SOURCES).fresh_candidates(PRINTS)] == []
        made = {**PRINTS, "triton": "triton-full-there"}
        assert [c.backend for c in rebased(old, made, SOURCES).fresh_candidates(made)] == ["triton"]

    def test_the_choice_then_those_that_raced_then_first_calls_and_never_what_was_wrong(self):
        stored = entry(
            row(), slow("triton", 9.0, tile=1), slow("triton", 12.0, tile=2), slow("torch", 11.0, samples=0),
            wrong("cupy", tile=3), slow("torch", None, tile=9),
            row("triton", 8.0, "rejected", "crash", "died", tile=7),
        )  # fmt: skip
        found = ranked(rebased(stored, PRINTS, SOURCES), PRINTS)
        assert [c.label for c in found] == [
            "cupy[default]", "triton[tile=1]", "triton[tile=2]", "torch[default]"
        ]  # fmt: skip

    def test_an_entry_from_before_sources_were_recorded_still_loads(self):
        body = entry().to_dict()
        for candidate in body["candidates"]:
            del candidate["source"]
        loaded = Entry.from_json(seal("entry", body))
        assert [c.source for c in loaded.candidates] == ["", ""]
        assert loaded.fresh_candidates({"cupy": "cupy-full-there"}) == loaded.candidates[:1]


class TestExtract:
    def test_samples_stay_of_the_choice_of_what_is_near_it_and_of_the_best_of_each_backend(self):
        stored = entry(
            row(us=10.0, tile=1), slow("cupy", 12.4, tile=2), slow("cupy", 12.6, tile=3),
            slow("triton", 30.0, tile=1), slow("triton", 29.0, tile=2), slow("torch", 900.0, samples=0),
        )  # fmt: skip
        kept = {c.label for c in extract(stored).candidates if len(c.samples_us) > 1}
        assert kept == {"cupy[tile=1]", "cupy[tile=2]", "triton[tile=2]"}

    def test_what_was_slower_keeps_its_time_and_one_sample_if_it_raced(self):
        for samples in (5, 0):
            stored = entry(row(), slow("cupy", 20.0, samples, reason="100 % slower", tile=2))
            found = extract(stored).candidates[1]
            assert (found.median_us, found.code, found.reason) == (20.0, "slow", None)
            assert found.samples_us == (20.0,)[:samples]

    def test_what_was_found_wrong_stays_with_its_reason_however_fast(self):
        stored = entry(row(), row("triton", 9.0, "rejected", "wrong", "head 3 is off"))
        (_, found) = extract(stored).candidates
        assert (found.code, found.reason, found.samples_us) == ("wrong", "head 3 is off", ())

    def test_what_was_not_installed_is_left_out(self):
        stored = entry(row(), dataclasses.replace(wrong("triton"), code="not_installed"))
        assert [c.backend for c in extract(stored).candidates] == ["cupy"]

    def test_reasons_are_short_and_name_no_folders(self):
        reason = "raised in /home/someone/.cache/isokern/kernels.py:12:\n   ValueError: 'a/b' " + "x" * 500
        found = extract(entry(row(), wrong("triton", reason))).candidates[1].reason
        assert found.startswith("raised in kernels.py:12: ValueError: 'a/b' x")
        assert len(found) == REASON_CHARACTERS

    def test_its_size_is_bounded(self):
        many = [slow("cupy", 10.0 + n, 1000, "y" * 9999, tile=n) for n in range(60)]
        assert len(extract(entry(row(samples=1000), *many)).candidates[0].samples_us) == MAX_SAMPLES
        assert len(extract(entry(row(samples=1000), *many)).to_json()) < 32 * 1024

    def test_twice_is_once(self):
        stored = entry(row(samples=100), slow("triton", 12.0, reason="z" * 500), slow("triton", 99.0, tile=2))
        assert extract(extract(stored)) == extract(stored)


class TestStrangers:
    def test_what_raced_nowhere_goes_unless_it_was_near_wrong_or_all_there_is_of_its_backend(self):
        slower = [slow("cupy", 50.0, samples=0, tile=n) for n in (2, 3)]
        others = [
            slow("cupy", 12.0, samples=0, tile=4), wrong("cupy", tile=5), slow("torch", 90.0, samples=0, tile=1),
            slow("torch", 80.0, samples=0, tile=2), slow("cupy", None, tile=6),
        ]  # fmt: skip
        one = entry(row(), *slower, *others)
        two = entry(row(), slow("cupy", 30.0, tile=3), key={**KEY, "N": 9})
        first, second = without_strangers([one, two])
        assert [c.label for c in first.candidates] == [
            "cupy[default]", "cupy[tile=3]", "cupy[tile=4]", "cupy[tile=5]", "torch[tile=2]"
        ]  # fmt: skip
        assert second == two


class TestShip:
    def test_takes_what_is_current_in_environments_that_name_a_product_and_no_machine(self, tmp_path):
        write(tmp_path / "store", entry())
        done = make(tmp_path)
        assert (done.added, done.entries) == (1, 1)
        (manifest,) = (tmp_path / "tables").glob("v1/*/manifest.json")
        assert json.loads(manifest.read_text())["body"]["labels"] == {"product": "NVIDIA H100 80GB HBM3"}
        layer = Layer("shipped", tmp_path / "tables")
        assert [f.problem for f in check_layer(layer)] == ["", ""]
        assert isinstance(Store([layer]).get("some_op", 1, KEY, THERE), Hit)

    def test_records_the_source_where_the_tuner_had_not(self, tmp_path):
        whole = Current(1, {"cupy": "cupy-full-there", "triton": "other"}, SOURCES)
        write(tmp_path / "store", entry(row(source=""), row("triton", 11.0, source="")))
        make(tmp_path, whole)
        assert [(c.backend, c.source) for c in only_entry(tmp_path / "tables").candidates] == [("cupy", "c-src")]

    @pytest.mark.parametrize(
        ("current", "why"),
        [
            (dataclasses.replace(CURRENT, sources={**SOURCES, "cupy": "edited"}), "'cupy' has changed since"),
            (dataclasses.replace(CURRENT, contract_version=2), "another version of the contract"),
            (None, "not registered"),
        ],
    )
    def test_what_is_not_current_is_left_out_and_a_table_of_nothing_is_refused(self, tmp_path, current, why):
        write(tmp_path / "store", entry())
        with pytest.raises(StoreError, match=why):
            make(tmp_path, current)
        assert not (tmp_path / "tables").exists()

    def test_a_changed_loser_goes_and_the_entry_stays(self, tmp_path):
        write(tmp_path / "store", entry())
        make(tmp_path, dataclasses.replace(CURRENT, sources={**SOURCES, "triton": "edited"}))
        assert [c.backend for c in only_entry(tmp_path / "tables").candidates] == ["cupy"]

    def test_the_same_input_gives_the_same_bytes_in_any_order(self, tmp_path):
        entries = [entry(key={**KEY, "N": n}) for n in range(6)]
        for name in ("a", "b"):
            random.Random(name).shuffle(entries)
            write(tmp_path / name / "store", *entries)
            make(tmp_path / name)
        assert contents(tmp_path / "a" / "tables") == contents(tmp_path / "b" / "tables")
        again = make(tmp_path / "a")
        assert (again.added, again.replaced, again.kept, again.removed) == (0, 0, 6, 0)
        assert contents(tmp_path / "a" / "tables") == contents(tmp_path / "b" / "tables")

    def test_a_newer_measurement_replaces_and_an_older_one_does_not(self, tmp_path):
        write(tmp_path / "store", entry(created="2026-11-02", rule="first"))
        make(tmp_path)
        write(tmp_path / "store", entry(created="2026-11-01", rule="older"), entry(key={**KEY, "N": 1}))
        done = make(tmp_path)
        assert (done.added, done.replaced, done.kept) == (1, 0, 1)
        write(tmp_path / "store", entry(created="2026-11-03", rule="newer"))
        done = make(tmp_path)
        assert (done.added, done.replaced, done.kept) == (0, 1, 1)
        hit = Store([Layer("shipped", tmp_path / "tables")]).get("some_op", 1, KEY, THERE)
        assert hit.entry.rule == "newer"

    def test_of_one_silicon_only_the_newest_stays_whatever_libraries_it_was_made_with(self, tmp_path):
        write(tmp_path / "store", entry(created="2026-11-02"), entry(key={**KEY, "N": 1}, created="2026-11-02"))
        make(tmp_path)
        newer = dataclasses.replace(THERE, versions=(("torch", "2.13.0"),))
        write(tmp_path / "store", entry(environment=newer, created="2026-11-05"), environment=newer)
        done = make(tmp_path)
        assert (done.added, done.kept, done.removed) == (1, 1, 1)
        assert {e.entry.environment for e in Store([Layer("x", tmp_path / "tables")]).entries()} == {
            THERE.hash, newer.hash
        }  # fmt: skip

    def test_what_was_shipped_and_is_no_longer_current_goes(self, tmp_path):
        write(tmp_path / "store", entry(), entry(row("triton"), slow("torch", 11.0), key={**KEY, "N": 1}))
        make(tmp_path)
        done = make(tmp_path, dataclasses.replace(CURRENT, sources={**SOURCES, "triton": "edited"}))
        assert (done.kept + done.replaced, done.removed) == (1, 1)
        assert only_entry(tmp_path / "tables").backend == "cupy"

    @pytest.mark.parametrize(
        "environment",
        [
            dataclasses.replace(THERE, driver="unknown"),
            dataclasses.replace(THERE, versions=(("triton", "3.6.0"),)),
            dataclasses.replace(THERE, versions=(("torch", "2.11.0+dirty"),)),
        ],
        ids=["driver", "no torch", "dirty"],
    )
    def test_an_environment_that_nobody_could_recognise_is_refused(self, tmp_path, environment):
        write(tmp_path / "store", entry(environment=environment), environment=environment)
        with pytest.raises(UnshippableError, match="nobody can tell"):
            make(tmp_path)
        assert not (tmp_path / "tables").exists()

    def test_so_is_a_measurement_of_a_tree_that_was_not_clean(self, tmp_path):
        write(tmp_path / "store", entry(isokern="0.1.0+dirty"))
        with pytest.raises(UnshippableError, match="isokern 0"):
            make(tmp_path)

    @pytest.mark.parametrize("which", ["manifest", "entry"])
    @pytest.mark.parametrize("of", ["store", "tables"])
    def test_a_damaged_file_is_refused(self, tmp_path, which, of):
        write(tmp_path / "store", entry())
        make(tmp_path)
        pattern = "v1/*/manifest.json" if which == "manifest" else "v1/*/entries/*/*.json"
        (path,) = (tmp_path / of).glob(pattern)
        path.write_text("{")
        with pytest.raises(UnshippableError, match=path.name):
            make(tmp_path)

    def test_so_is_one_whose_environment_is_not_described(self, tmp_path):
        write(tmp_path / "store", entry())
        (tmp_path / "store" / "v1" / THERE.hash / "manifest.json").unlink()
        with pytest.raises(UnshippableError, match="missing"):
            make(tmp_path)

    def test_other_environments_can_be_left_alone(self, tmp_path):
        odd = dataclasses.replace(THERE, driver="unknown")
        write(tmp_path / "store", entry())
        write(tmp_path / "store", entry(environment=odd), environment=odd)
        assert make(tmp_path, environment=THERE.hash[:8]).entries == 1

    def test_a_run_that_was_interrupted_before_it_published_is_no_damage(self, tmp_path):
        write(tmp_path / "store", entry())
        (tmp_path / "store" / "v1" / "0123456789abcdef" / "journal").mkdir(parents=True)
        assert make(tmp_path).entries == 1


class TestCommand:
    def run(self, *words):
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    @pytest.fixture
    def current(self, monkeypatch):
        monkeypatch.setattr(cli, "_current_of", lambda: lambda op: CURRENT if op == "some_op" else None)

    def test_says_what_it_did(self, tmp_path, current):
        write(tmp_path / "store", entry(), dataclasses.replace(entry(), op="gone_op"))
        result = self.run("ship", "--root", tmp_path / "store", "--out", tmp_path / "tables")
        assert result.exit_code == 0, result.stderr
        assert "1 added, 0 replaced, 0 kept, 0 removed: 1 entries in" in result.stdout
        assert "left out 1 entries of op 'gone_op', which is not registered" in result.stderr

    def test_asks_the_registry_what_is_current(self, tmp_path):
        write(tmp_path / "store", entry())
        result = self.run("ship", "--root", tmp_path / "store", "--out", tmp_path / "tables")
        assert result.exit_code == 2
        assert "no entry to ship: 1 of op 'some_op', which is not registered" in result.stderr

    def test_a_store_that_is_not_there_is_one_line(self, tmp_path, current):
        result = self.run("ship", "--root", tmp_path / "store", "--out", tmp_path / "tables")
        assert result.exit_code == 2
        assert "is not a directory" in result.stderr

    def test_list_and_verify_show_the_layer(self, tmp_path, current, monkeypatch):
        write(tmp_path / "store", entry())
        self.run("ship", "--root", tmp_path / "store", "--out", tmp_path / "tables")
        layers = [Layer("user", tmp_path / "user", writable=True), Layer("shipped", tmp_path / "tables")]
        monkeypatch.setattr(cli.Store, "default", classmethod(lambda cls, root=None: Store(layers)))
        listed = self.run("list", "--layer", "shipped")
        assert (listed.exit_code, "1 entries" in listed.stdout, entry().key_hash in listed.stdout) == (0, True, True)
        checked = self.run("verify")
        assert f"shipped\t{tmp_path / 'tables'}\t2 files, 0 invalid" in checked.stdout
        assert checked.exit_code == 0
        (path,) = (tmp_path / "tables").glob("v1/*/entries/*/*.json")
        path.write_text("{")
        checked = self.run("verify")
        assert checked.exit_code == 1
        assert "2 files, 1 invalid" in checked.stdout
        assert str(path) in checked.stderr


def test_reading_tables_warns_of_nothing_when_all_is_well(tmp_path):
    write(tmp_path / "tables", entry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store([Layer("shipped", tmp_path / "tables")]).tables(HERE)
