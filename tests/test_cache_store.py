"""The tuning store: precedence of layers, partial invalidation, damaged files, and disks that refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from isokern.cache.audit import check_layer
from isokern.cache.candidate import CandidateRecord
from isokern.cache.codec import seal
from isokern.cache.entry import Entry
from isokern.cache.environment import Environment
from isokern.cache.found import Hit, Miss
from isokern.cache.layer import Layer
from isokern.cache.prune import Criteria, find_removals, remove
from isokern.cache.silicon import CpuSilicon, CudaSilicon
from isokern.cache.store import CacheWarning, Store
from isokern.errors import StoreError

HERE = Environment("cpu", CpuSilicon("x86_64", 8, ("avx2",)), 8, "", (("torch", "2.13.0"),), "3.11")
ELSEWHERE = dataclasses.replace(HERE, versions=(("torch", "2.12.0"),))
KEY = {"K": 128, "N": 8, "policy": "eager"}
NOW = {"numba": "n1", "torch": "t1"}


def make_entry(
    key=KEY,
    backend="numba",
    environment=HERE,
    created="2025-11-02T10:00:00+00:00",
    rule="",
    numba="n1",
    torch="t1",
):
    return Entry(
        op="some_op",
        contract_version=1,
        key=dict(key),
        backend=backend,
        config={},
        margin_over_runner_up=0.5,
        margin_over_default=0.5,
        rule=rule,
        candidates=(
            CandidateRecord("numba", {}, "ok", None, None, 10.0, (10.0, 10.5), numba),
            CandidateRecord("torch", {}, "ok", None, None, 20.0, (20.0, 20.5), torch),
        ),
        measured={
            "policy": "eager",
            "method": "perf_counter",
            "launches": 4,
            "seconds": 0.1,
            "created": created,
            "isokern": "0.1.0",
        },
        environment=environment.hash,
    )


def one_layer(root: Path) -> Store:
    return Store([Layer("user", root, writable=True)])


@pytest.fixture
def store(tmp_path):
    return one_layer(tmp_path)


def test_what_was_put_is_found_by_another_store(tmp_path):
    path = one_layer(tmp_path).put(make_entry(), HERE)
    assert path == tmp_path / "v1" / HERE.hash / "entries" / "some_op" / f"{make_entry().key_hash}.json"
    assert one_layer(tmp_path).get("some_op", 1, KEY, HERE, NOW) == Hit(make_entry(), "user", (), path)


def test_the_manifest_says_what_the_environment_hash_means(tmp_path):
    one_layer(tmp_path).put(make_entry(), HERE)
    body = json.loads((tmp_path / "v1" / HERE.hash / "manifest.json").read_text())["body"]
    assert Environment.from_dict(body) == HERE


def test_a_damaged_manifest_is_repaired_by_the_next_put_and_a_sound_one_left_alone(tmp_path):
    manifest = tmp_path / "v1" / HERE.hash / "manifest.json"
    one_layer(tmp_path).put(make_entry(), HERE)
    written = manifest.stat().st_ino
    one_layer(tmp_path).put(make_entry(), HERE)
    assert manifest.stat().st_ino == written
    manifest.write_text("{")
    one_layer(tmp_path).put(make_entry(), HERE)
    assert Layer("user", tmp_path).read_environment(HERE.hash) == HERE


@pytest.mark.parametrize(
    "asked",
    [
        ("other_op", 1, KEY, HERE),
        ("some_op", 2, KEY, HERE),
        ("some_op", 1, {**KEY, "N": 16}, HERE),
        ("some_op", 1, {**KEY, "policy": "graph"}, HERE),
        ("some_op", 1, {**KEY, "K": 128.0}, HERE),
        ("some_op", 1, KEY, ELSEWHERE),
    ],
)
def test_anything_else_is_a_miss_that_names_the_layers_searched(store, asked):
    store.put(make_entry(), HERE)
    assert store.get(*asked) == Miss("no entry in memory, user")


def test_an_entry_cannot_be_put_under_another_environment(store):
    with pytest.raises(StoreError, match="is of environment"):
        store.put(make_entry(), ELSEWHERE)


class TestLayers:
    def test_the_first_layer_that_has_the_key_wins_and_only_the_first_writable_one_is_written(self, tmp_path):
        names = ("explicit", "user", "site", "shipped")
        layers = [Layer(name, tmp_path / name, writable=name in {"explicit", "user"}) for name in names]
        for layer in reversed(layers):
            layer.write(make_entry(rule=layer.name), HERE)
            hit = Store(layers).get("some_op", 1, KEY, HERE)
            assert (hit.layer, hit.entry.rule) == (layer.name, layer.name)
        before = [(tmp_path / name).stat().st_mtime_ns for name in names]
        new = make_entry(key={**KEY, "N": 1})
        assert Store(layers[1:]).put(new, HERE).is_relative_to(tmp_path / "user")
        assert Store(layers).put(new, HERE).is_relative_to(tmp_path / "explicit")
        assert [(tmp_path / name).stat().st_mtime_ns for name in names] == before
        assert len(list((tmp_path / "site").rglob("*.json"))) == 2

    def test_a_stale_entry_does_not_hide_a_usable_one_in_a_lower_layer(self, tmp_path):
        user, shipped = Layer("user", tmp_path / "a", writable=True), Layer("shipped", tmp_path / "b")
        user.write(make_entry(numba="old"), HERE)
        shipped.write(make_entry(), HERE)
        assert Store([user, shipped]).get("some_op", 1, KEY, HERE, NOW).layer == "shipped"

    def test_the_default_store_reads_the_environment_once(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path / "variable"))
        monkeypatch.setenv("ISOKERN_SITE_CACHE", str(tmp_path / "site"))
        store = Store.default()
        monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path / "changed"))
        assert [layer.name for layer in store.layers] == ["explicit", "user", "site", "shipped"]
        assert store.put(make_entry(), HERE).is_relative_to(tmp_path / "variable")
        assert Store.default(tmp_path / "argument").writable_layer.root == tmp_path / "argument"
        assert store.layers[2] == Layer("site", tmp_path / "site", writable=False)
        assert not store.layers[3].writable

    def test_without_a_variable_the_user_layer_is_first(self, tmp_path, monkeypatch):
        monkeypatch.delenv("ISOKERN_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        store = Store.default()
        assert [layer.name for layer in store.layers] == ["user", "site", "shipped"]
        assert store.writable_layer.name == "user"

    def test_a_store_without_a_writable_layer_keeps_entries_in_memory(self, tmp_path):
        store = Store([Layer("site", tmp_path)])
        with pytest.warns(CacheWarning, match="no writable layer"):
            assert store.put(make_entry(), HERE) is None
        assert store.get("some_op", 1, KEY, HERE, NOW).layer == "memory"


class TestFingerprints:
    def test_a_changed_loser_leaves_a_hit_that_names_it(self, store):
        store.put(make_entry(), HERE)
        assert store.get("some_op", 1, KEY, HERE, {**NOW, "torch": "t2"}).stale == ("torch",)

    def test_a_changed_winner_is_a_miss_that_names_it_and_the_losers_samples_stay(self, store):
        store.put(make_entry(), HERE)
        changed = {**NOW, "numba": "n2"}
        missed = store.get("some_op", 1, KEY, HERE, changed)
        assert missed == Miss("user: the chosen backend 'numba' has changed since it was measured")
        (kept,) = store.peek("some_op", 1, KEY, HERE).fresh_candidates(changed)
        assert (kept.backend, kept.samples_us) == ("torch", (20.0, 20.5))

    def test_a_winner_that_is_gone_is_a_miss_that_says_so(self, store):
        store.put(make_entry(), HERE)
        missed = store.get("some_op", 1, KEY, HERE, {"torch": "t1"})
        assert missed == Miss("user: the chosen backend 'numba' is no longer registered")

    def test_without_fingerprints_nothing_is_checked(self, store):
        store.put(make_entry(), HERE)
        assert isinstance(store.get("some_op", 1, KEY, HERE), Hit)


class TestMemoisedLookups:
    def test_a_miss_is_remembered_until_refresh(self, tmp_path):
        reader = one_layer(tmp_path)
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Miss)
        one_layer(tmp_path).put(make_entry(), HERE)
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Miss)
        reader.refresh()
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Hit)

    def test_a_hit_is_remembered_until_refresh(self, tmp_path):
        reader = one_layer(tmp_path)
        path = one_layer(tmp_path).put(make_entry(), HERE)
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Hit)
        path.unlink()
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Hit)
        reader.refresh()
        assert isinstance(reader.get("some_op", 1, KEY, HERE), Miss)

    def test_a_put_replaces_a_remembered_miss(self, store):
        assert isinstance(store.get("some_op", 1, KEY, HERE), Miss)
        store.put(make_entry(), HERE)
        assert isinstance(store.get("some_op", 1, KEY, HERE), Hit)

    def test_a_missing_or_stale_name_is_tried_again(self, tmp_path, monkeypatch):
        one_layer(tmp_path).put(make_entry(), HERE)
        failures = [FileNotFoundError(), OSError(errno.ESTALE, "stale file handle"), FileNotFoundError()]
        real = Path.read_bytes

        def unreliable(path):
            if failures:
                raise failures.pop()
            return real(path)

        monkeypatch.setattr(Path, "read_bytes", unreliable)
        assert isinstance(one_layer(tmp_path).get("some_op", 1, KEY, HERE), Hit)


def newer_schema(text: str) -> str:
    return json.dumps({**json.loads(text), "schema": 2})


def endless(text: str) -> str:
    """A number that JSON can hold and no float can, in a file that is sealed as it should be."""
    body = json.loads(text)["body"]
    body["candidates"][0]["median_us"] = 10**400
    return seal("entry", body)


def flipped_byte(text: str) -> str:
    return text.replace('"median_us":10.0', '"median_us":30.0')


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda text: text[: len(text) // 2], "not valid JSON"),
            (lambda text: "", "not valid JSON"),
            (flipped_byte, "checksum does not match"),
            (newer_schema, "schema 2 is newer than 1"),
            (lambda text: make_entry(key={"K": 1}).to_json(), "not what its path says"),
            (lambda text: make_entry(environment=ELSEWHERE).to_json(), "not what its path says"),
            (lambda text: text.replace("e", "\udcff"), "not valid JSON"),
            (endless, "expected a finite number, given an integer of 1329 bits"),
        ],
        ids=["truncated", "empty", "flipped", "newer", "other key", "other environment", "not utf-8", "endless"],
    )
    def test_a_damaged_file_is_a_miss_and_one_warning_naming_file_and_reason(self, store, damage, why):
        path = store.put(make_entry(), HERE)
        path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
        store.refresh()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert store.get("some_op", 1, KEY, HERE) == Miss("no entry in memory, user")
                assert list(store.entries()) == []
                store.refresh()
        assert [warning.category for warning in caught] == [CacheWarning]
        assert str(path) in str(caught[0].message)
        assert why in str(caught[0].message)

    def test_a_put_repairs_it(self, tmp_path):
        path = one_layer(tmp_path).put(make_entry(), HERE)
        path.write_text("{")
        one_layer(tmp_path).put(make_entry(), HERE)
        assert isinstance(one_layer(tmp_path).get("some_op", 1, KEY, HERE), Hit)

    def test_a_directory_in_the_place_of_a_file_is_a_miss(self, store):
        store.layers[0].entry_path(HERE.hash, "some_op", make_entry().key_hash).mkdir(parents=True)
        with pytest.warns(CacheWarning, match=r"cannot read .*Is a directory"):
            assert isinstance(store.get("some_op", 1, KEY, HERE), Miss)

    def test_a_key_that_cannot_be_stored_is_a_miss(self, store):
        with pytest.warns(CacheWarning, match="cannot look up"):
            assert isinstance(store.get("some_op", 1, {"scale": float("nan")}, HERE), Miss)

    def test_strays_and_unfinished_writes_are_not_entries(self, store):
        path = store.put(make_entry(), HERE)
        (path.parent / f".{path.name}.123.abcd.tmp").write_text("{")
        (path.parent / "notes.txt").write_text("x")
        (path.parents[1] / "stray").write_text("x")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [found.entry for found in store.entries()] == [make_entry()]

    def test_the_check_names_every_kind_of_damage_and_nothing_else(self, store):
        path = store.put(make_entry(), HERE)
        other = store.put(make_entry(key={"K": 1}), HERE)
        other.write_text("{")
        moved = path.with_name("0" * 16 + ".json")
        shutil.copy(path, moved)
        (path.parent / f".{path.name}.123.abcd.tmp").write_text("{")
        lonely = store.layers[0].manifest_path(ELSEWHERE.hash)
        store.put(make_entry(environment=ELSEWHERE), ELSEWHERE)
        lonely.unlink()
        problems = {found.path: found.problem for found in check_layer(store.layers[0])}
        assert {found for found, problem in problems.items() if problem} == {other, moved, lonely}
        assert problems[path] == ""
        assert problems[lonely].startswith("missing: ")

    def test_an_environment_without_entries_needs_no_manifest(self, store):
        journal = store.layers[0].schema_root / HERE.hash / "journal" / "some_op-0.jsonl"
        journal.parent.mkdir(parents=True)
        journal.write_text("{}\n")
        (store.layers[0].schema_root / ELSEWHERE.hash).mkdir()
        assert list(check_layer(store.layers[0])) == []

    def test_strays_are_listed_and_no_problem_unless_they_have_a_records_name(self, store):
        path = store.put(make_entry(), HERE)
        home = path.parents[2]
        strays = {path.with_name(".DS_Store"), path.parents[1] / "notes.txt", home / "notes.txt", home / "old"}
        for stray in strays - {home / "old"}:
            stray.write_text("x")
        (home / "old").mkdir()
        pretenders = {path.with_name("notes.json"), path.with_name("._" + path.name), path.parents[1] / "x.json"}
        for pretender in pretenders:
            pretender.write_text("x")
        found = list(check_layer(store.layers[0]))
        assert {one.path for one in found if one.stray} == strays
        assert {one.path for one in found if one.problem} == pretenders


class TestEntriesAndNearest:
    def test_entries_carry_layer_path_and_environment_and_can_be_filtered(self, tmp_path):
        layers = [Layer("user", tmp_path / "u", writable=True), Layer("site", tmp_path / "s")]
        layers[0].write(make_entry(), HERE)
        layers[1].write(make_entry(environment=ELSEWHERE), ELSEWHERE)
        store = Store(layers)
        assert [(e.layer_name, e.environment) for e in store.entries()] == [
            ("user", HERE),
            ("site", ELSEWHERE),
        ]
        assert [e.layer_name for e in store.entries(ELSEWHERE)] == ["site"]
        layers[0].manifest_path(HERE.hash).unlink()
        store.refresh()
        assert [e.environment for e in store.entries(HERE)] == [None]

    def test_nearest_is_fewest_fields_then_closest_numbers(self, store):
        assert store.nearest("some_op", KEY) is None
        one_field_off = [{"K": 128, "N": n} for n in (1024, 2048, 4096, 512, 64, 16)]
        for key in ({"K": 64, "N": 16}, *one_field_off):
            store.put(make_entry(key={**key, "policy": "eager"}), HERE)
        found = store.nearest("some_op", KEY)
        assert found.located.entry.key["N"] == 16
        assert found.differences == {"N": (8, 16)}
        assert store.nearest("other_op", KEY) is None
        assert store.nearest("some_op", KEY, ELSEWHERE) is None

    def test_nearest_shows_fields_only_one_side_has(self, store):
        store.put(make_entry(key={"K": 128, "N": 8, "old": True}), HERE)
        assert set(store.nearest("some_op", KEY).differences) == {"old", "policy"}


class TestPrune:
    def removed(self, layer, **criteria):
        removals = list(find_removals(layer, Criteria(**criteria)))
        remove(removals)
        return {removal.path for removal in removals}

    def test_by_default_only_temporaries_older_than_an_hour_go(self, store):
        path = store.put(make_entry(), HERE)
        old, young = (path.with_name(f".x.{name}.tmp") for name in ("old", "young"))
        for file in (old, young):
            file.write_text("")
        os.utime(old, (time.time() - 3700,) * 2)
        assert self.removed(store.layers[0]) == {old}
        assert young.exists()
        assert path.exists()

    def test_other_environments_go_whole_but_not_another_thread_count_nor_an_absent_device(self, store):
        threads = dataclasses.replace(HERE, threads=1)
        on_a_gpu = Environment("cuda", CudaSilicon("9.0", 132, 79), 0, "13.0", (), "3.11")
        for environment in (HERE, threads, on_a_gpu, ELSEWHERE):
            store.put(make_entry(environment=environment), environment)
        layer = store.layers[0]
        assert self.removed(layer, keep_environments=()) == set()
        gone = self.removed(layer, keep_environments=[HERE])
        assert gone == {
            layer.manifest_path(ELSEWHERE.hash),
            layer.entry_path(ELSEWHERE.hash, "some_op", make_entry().key_hash),
        }
        assert set(layer.environments()) == {HERE.hash, threads.hash, on_a_gpu.hash}

    def test_an_environments_journal_goes_with_it(self, store):
        layer = store.layers[0]
        for environment in (HERE, ELSEWHERE):
            store.put(make_entry(environment=environment), environment)
            (layer.schema_root / environment.hash / "journal").mkdir()
            (layer.schema_root / environment.hash / "journal" / "some_op-0.jsonl").write_text("{}\n")
        assert layer.schema_root / ELSEWHERE.hash / "journal" / "some_op-0.jsonl" in self.removed(
            layer, keep_environments=[HERE]
        )
        assert not (layer.schema_root / ELSEWHERE.hash).exists()
        assert (layer.schema_root / HERE.hash / "journal" / "some_op-0.jsonl").exists()

    def test_stale_goes_by_the_chosen_backend_alone(self, store):
        kept = store.put(make_entry(key={"K": 1}, torch="old"), HERE)
        gone = store.put(make_entry(key={"K": 2}, numba="old"), HERE)
        unknown = store.put(make_entry(key={"K": 3}, backend="torch", numba="old"), HERE)
        assert self.removed(store.layers[0], fingerprints_of=lambda op: None) == set()
        assert self.removed(store.layers[0], fingerprints_of=lambda op: {"numba": "n1"}) == {gone}
        assert kept.exists()
        assert unknown.exists()

    def test_invalid_files_go_only_when_asked(self, store):
        path = store.put(make_entry(), HERE)
        path.write_text("{")
        assert self.removed(store.layers[0]) == set()
        assert self.removed(store.layers[0], invalid=True) == {path}

    def test_invalid_is_what_the_check_complains_about(self, store):
        path = store.put(make_entry(), HERE)
        kept = [path.with_name(".DS_Store"), path.parents[1] / "notes.txt"]
        gone = [path.with_name("notes.json"), path.parents[1] / "x.json"]
        for file in (*kept, *gone):
            file.write_text("x")
        odd = path.with_name("0" * 16 + ".json")
        odd.mkdir()
        layer = store.layers[0]
        assert self.removed(layer, invalid=True) == {*gone, odd}
        assert not any(file.exists() for file in (*gone, odd))
        assert all(file.exists() for file in (path, *kept))
        assert [one.problem for one in check_layer(layer) if one.problem] == []

    def test_entries_without_a_manifest_are_used_where_they_were_tuned_so_they_stay(self, store):
        path = store.put(make_entry(), HERE)
        store.layers[0].manifest_path(HERE.hash).unlink()
        assert self.removed(store.layers[0], invalid=True) == set()
        assert path.exists()

    def test_what_goes_for_two_reasons_goes_once(self, store):
        path = store.put(make_entry(environment=ELSEWHERE), ELSEWHERE)
        path.write_text("{")
        removals = list(find_removals(store.layers[0], Criteria(keep_environments=[HERE], invalid=True)))
        assert sorted(r.path for r in removals) == sorted([path, store.layers[0].manifest_path(ELSEWHERE.hash)])
        assert removals[-1].path.name == "manifest.json", "last, so that the rest is recognised if interrupted"

    def test_a_file_that_cannot_be_read_hinders_no_other_criterion(self, store):
        odd = store.put(make_entry(key={"K": 1}), HERE)
        odd.unlink()
        odd.mkdir()
        stale = store.put(make_entry(numba="old"), HERE)
        assert self.removed(store.layers[0], fingerprints_of=lambda op: {"numba": "n1"}) == {stale}

    def test_a_put_survives_the_removal_of_its_directory_in_between(self, store, monkeypatch):
        real, calls = os.open, []

        def vanishing(path, *rest):
            if not calls:
                Path(path).parent.rmdir()
            calls.append(path)
            return real(path, *rest)

        monkeypatch.setattr(os, "open", vanishing)
        assert store.put(make_entry(), HERE) is not None
        assert isinstance(one_layer(store.layers[0].root).get("some_op", 1, KEY, HERE), Hit)


#: Run in a child process: puts four entries below argv[1], gets them, and reports what happened. PREPARE is the
#: statement that breaks the disk.
CHILD = """
    import json, os, pathlib, resource, sys, warnings
    from isokern.cache import CandidateRecord, Entry, Layer, Store
    from isokern.cache.environment import Environment
    from isokern.cache.silicon import CpuSilicon, CudaSilicon

    here = Environment("cpu", CpuSilicon("x86_64", 8, ()), 8, "", (), "3.11")
    measured = dict(policy="eager", method="", launches=1, seconds=1, created="2025-11-02", isokern="0")
    def entry(n, samples=3):
        won = CandidateRecord("b", {}, "ok", None, None, 1.0, (1.0,) * samples, "f")
        return Entry("some_op", 1, {"n": n}, "b", {}, None, None, "", (won,), measured, here.hash)

    root = sys.argv[1]
    store = Store([Layer("user", pathlib.Path(root), writable=True)])
    entries = [entry(n, 20_000) for n in range(4)]
    PREPARE
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paths = [store.put(e, here) for e in entries] if PUTS else []
        hits = [store.get("some_op", 1, e.key, here, {"b": "f"}) for e in entries]
        store.refresh()
        again = [store.get("some_op", 1, e.key, here, {"b": "f"}) for e in entries]
        left = [name for _, _, names in os.walk(root) for name in names if name.endswith(".tmp")]
        print(json.dumps({
            "written": sum(p is not None for p in paths),
            "layers": [h.layer for h in hits], "again": [h.layer for h in again], "left": left,
            "warnings": [str(w.message) for w in caught], "kinds": [w.category.__name__ for w in caught],
        }))
"""


def in_child(root: Path, prepare: str, prefix: tuple[str, ...] = (), puts: bool = True) -> dict:
    code = textwrap.dedent(CHILD).replace("PREPARE", prepare).replace("PUTS", str(puts))
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, str(root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_degraded_to_memory(report: dict, why: str) -> None:
    assert report["written"] == 0
    assert report["layers"] == report["again"] == ["memory"] * 4
    assert report["kinds"] == ["CacheWarning"], "one warning for four failing writes"
    assert why in report["warnings"][0]
    assert report["left"] == []


class TestDisksThatRefuse:
    @pytest.fixture
    def visible(self):
        """A directory that an unprivileged user can reach (pytest's own are closed to others)."""
        root = Path(tempfile.mkdtemp(prefix="isokern-"))
        root.chmod(0o755)
        yield root
        subprocess.run(["chmod", "-R", "u+w", str(root)], check=True)
        shutil.rmtree(root)

    @staticmethod
    def forbid_writing(root: Path) -> str:
        # root ignores permissions, so there the child becomes nobody
        return "os.setuid(65534)" if os.geteuid() == 0 else f"os.system('chmod -R a-w {root}')"

    def test_a_read_only_directory(self, visible):
        assert_degraded_to_memory(in_child(visible, self.forbid_writing(visible)), "Permission denied")
        assert list(visible.iterdir()) == []

    def test_a_read_only_directory_is_still_read(self, visible):
        assert in_child(visible, "")["written"] == 4
        report = in_child(visible, self.forbid_writing(visible), puts=False)
        assert report["layers"] == report["again"] == ["user"] * 4
        assert report["warnings"] == []

    def test_a_root_below_a_regular_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert_degraded_to_memory(in_child(tmp_path / "file" / "root", ""), "Not a directory")

    def test_a_file_system_that_is_full(self, tmp_path):
        """A real one: a private mount of 64 KiB, seen by the child alone."""
        mount = 'mount -t tmpfs -o size=64k tmpfs "$0" || exit 77; exec "$@"'
        user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        prefix = ("unshare", *user, "--mount", "sh", "-c", mount, str(tmp_path))
        if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("no private mounts on this system; the next test covers a write cut short")
        assert_degraded_to_memory(in_child(tmp_path, "", prefix), "No space left on device")

    def test_a_write_cut_short(self, tmp_path):
        prepare = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
        assert_degraded_to_memory(in_child(tmp_path, prepare), "File too large")

    def test_writing_resumes_when_the_disk_recovers(self, tmp_path):
        (tmp_path / "root").write_text("in the way")
        store = one_layer(tmp_path / "root")
        with pytest.warns(CacheWarning, match="cannot write the store"):
            store.put(make_entry(), HERE)
        (tmp_path / "root").unlink()
        store.put(make_entry(rule="second"), HERE)
        found = store.get("some_op", 1, KEY, HERE, NOW)
        assert (found.layer, found.entry.rule) == ("user", "second")
