"""``isokern cache``: every command, its exit code, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import types
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from isokern import registry
from isokern.cache import cli, prune
from isokern.cache.candidate import CandidateRecord
from isokern.cache.cli import app
from isokern.cache.codec import seal
from isokern.cache.entry import Entry
from isokern.cache.environment import Environment
from isokern.cache.layer import Layer
from isokern.cache.silicon import CpuSilicon
from isokern.errors import UnknownNameError

LABELS = (("product", "AMD EPYC"),)
HERE = Environment("cpu", CpuSilicon("x86_64", 8, ("avx2",)), 8, "", (("torch", "2.13.0"),), "3.11", LABELS)
ELSEWHERE = dataclasses.replace(HERE, versions=(("torch", "2.12.0"),))


def make_entry(n=8, op="some_op", backend="numba", environment=HERE, created="2025-11-02", fingerprint="n1"):
    return Entry(
        op=op,
        contract_version=1,
        key={"K": 128, "N": n, "policy": "eager"},
        backend=backend,
        config={},
        margin_over_runner_up=0.5,
        margin_over_default=None,
        rule="beat the default",
        candidates=(
            CandidateRecord("numba", {}, "ok", None, None, 10.0, (10.0, 10.5), fingerprint, ("repeatable",)),
            CandidateRecord("torch", {}, "ok", None, None, 20.0, (20.0,), "t1"),
            CandidateRecord("cupy", {"tile": 32}, "rejected", "wrong", "slot 3 [bold]off[/] by 0.5", None, (), "c1"),
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


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def fill(root):
    def write(*entries, to=root, environment=HERE):
        return [Layer("explicit", to).write(entry, environment) for entry in entries]

    return write


def run(*words):
    """The command's outcome. An exception other than the exit itself is a traceback in a user's face."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assert_error(result, text):
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert text in line


class TestList:
    def test_shows_each_entry_and_how_many(self, root, fill):
        fill(make_entry(), make_entry(op="other_op", backend="torch"))
        result = run("list", "--root", root)
        assert result.exit_code == 0
        assert make_entry().key_hash in result.stdout
        assert "torch[default]" in result.stdout
        assert "50.0 %" in result.stdout
        assert "2 entries" in result.stdout

    def test_filters_by_op(self, root, fill):
        fill(make_entry(), make_entry(op="other_op"))
        result = run("list", "--root", root, "--op", "other_op")
        assert "1 entries" in result.stdout
        assert "some_op" not in result.stdout

    def test_filters_by_layer_of_the_users_store(self, tmp_path, fill, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path / "mine"))
        monkeypatch.setenv("ISOKERN_SITE_CACHE", str(tmp_path / "site"))
        fill(make_entry(), to=tmp_path / "mine")
        fill(make_entry(backend="torch"), make_entry(9), to=tmp_path / "site")
        assert "3 entries" in run("list").stdout
        assert "2 entries" in run("list", "--layer", "site").stdout
        shipped = run("list", "--layer", "shipped").stdout
        assert f"and {shipped.split()[-2]} shipped (--layer shipped)" in run("list").stdout
        assert_error(run("list", "--layer", "sight"), "did you mean 'site'?")

    def test_an_empty_store_is_no_error(self, root):
        result = run("list", "--root", root)
        assert (result.exit_code, result.stdout) == (0, "0 entries\n")

    def test_a_damaged_file_is_one_line_of_warning(self, root, fill):
        (path, _) = fill(make_entry(), make_entry(9))
        path.write_text("{")
        result = run("list", "--root", root)
        assert result.exit_code == 0
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"warning: ignoring {path}: not valid JSON")
        assert "1 entries" in result.stdout


class TestShow:
    def test_shows_all_candidates_with_status_reason_and_median(self, root, fill):
        fill(make_entry())
        result = run("show", make_entry().key_hash[:6], "--root", root)
        assert result.exit_code == 0
        for text in ("K=128 N=8 policy=eager", "numba[default]", "cupy[tile=32]", "rejected", "wrong", "20"):
            assert text in result.stdout
        assert "slot 3 [bold]off[/] by 0.5" in result.stdout, "a reason is text, not markup"
        assert "AMD EPYC" in result.stdout

    def test_shows_one_key_in_every_environment(self, root, fill):
        fill(make_entry())
        fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        result = run("show", make_entry().key_hash, "--root", root)
        assert HERE.hash in result.stdout
        assert ELSEWHERE.hash in result.stdout

    def test_an_unknown_or_ambiguous_prefix_is_an_error(self, root, fill):
        fill(make_entry(), make_entry(9))
        assert_error(run("show", "zz", "--root", root), "no entry's key hash starts with 'zz'")
        assert_error(run("show", "", "--root", root), "ambiguous")


class TestDiff:
    def test_two_entries_field_by_field(self, root, fill):
        one, two = make_entry(), make_entry(9, backend="torch")
        fill(one, two)
        result = run("diff", one.key_hash, two.key_hash, "--root", root)
        assert result.exit_code == 1
        fields = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
        assert fields == ["backend", "key.N"]

    def test_one_key_in_two_environments(self, root, fill):
        fill(make_entry())
        fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        key = make_entry().key_hash
        result = run("diff", f"{HERE.hash[:8]}/{key}", f"{ELSEWHERE.hash[:8]}/{key}", "--root", root)
        assert result.exit_code == 1
        assert "environment.versions.torch" in result.stdout
        assert_error(run("diff", key, key, "--root", root), "in several environments")

    def test_an_entry_and_itself(self, root, fill):
        fill(make_entry())
        result = run("diff", make_entry().key_hash, make_entry().key_hash, "--root", root)
        assert (result.exit_code, result.stdout) == (0, "no differences\n")

    def test_two_stores_choice_by_choice(self, root, fill, tmp_path):
        fill(make_entry(1), make_entry(2), make_entry(3))
        fill(make_entry(1), make_entry(2, backend="torch"), make_entry(4), to=tmp_path / "b")
        result = run("diff", root, tmp_path / "b")
        assert result.exit_code == 1
        assert make_entry(1).key_hash not in result.stdout
        for n in (2, 3, 4):
            assert make_entry(n).key_hash in result.stdout
        assert result.stdout.count("(absent)") == 2
        assert run("diff", root, root).exit_code == 0

    def test_two_machines_stores_are_compared_key_by_key(self, root, fill, tmp_path):
        fill(make_entry())
        fill(make_entry(environment=ELSEWHERE), to=tmp_path / "b", environment=ELSEWHERE)
        result = run("diff", root, tmp_path / "b")
        assert "versions.torch" in result.stdout
        assert make_entry().key_hash not in result.stdout

    def test_a_store_and_something_else(self, root, fill):
        fill(make_entry())
        assert_error(run("diff", root, root / "none"), "is not a directory")


class TestExportImport:
    def test_round_trip(self, root, fill, tmp_path):
        fill(make_entry(), make_entry(9))
        fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        assert "3 entries written" in run("export", tmp_path / "bundle", "--root", root).stdout
        other = tmp_path / "other"
        result = run("import", tmp_path / "bundle", "--root", other)
        assert result.exit_code == 0
        assert "3 added, 0 replaced, 0 kept" in result.stdout
        files = sorted(path.relative_to(root) for path in root.rglob("*.json"))
        assert sorted(path.relative_to(other) for path in other.rglob("*.json")) == files
        assert all((other / file).read_bytes() == (root / file).read_bytes() for file in files)
        assert "0 added, 0 replaced, 3 kept" in run("import", tmp_path / "bundle", "--root", other).stdout

    def test_export_of_one_op_or_environment(self, root, fill, tmp_path):
        fill(make_entry(), make_entry(op="other_op"))
        fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        assert "1 entries" in run("export", tmp_path / "b", "--root", root, "--op", "other_op").stdout
        chosen = ("--environment", ELSEWHERE.hash[:6])
        assert "1 entries" in run("export", tmp_path / "b", "--root", root, *chosen).stdout

    def test_an_entry_without_its_manifest_is_skipped_and_said_so(self, root, fill, tmp_path):
        fill(make_entry())
        Layer("explicit", root).manifest_path(HERE.hash).unlink()
        result = run("export", tmp_path / "bundle", "--root", root)
        assert "0 entries written" in result.stdout
        assert "skipped 1 entries" in result.stderr

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text[:-50], "not valid JSON"),
            (lambda text: text.replace('"median_us":20.0', '"median_us":5.0'), "checksum"),
            (lambda text: text.replace('"schema":1', '"schema":2'), "schema 2 is newer"),
            (lambda text: make_entry().to_json(), "expected kind 'bundle'"),
        ],
    )
    def test_a_damaged_or_foreign_bundle_writes_nothing(self, root, fill, tmp_path, damage, message):
        fill(make_entry(), make_entry(9))
        run("export", tmp_path / "bundle", "--root", root)
        (tmp_path / "bundle").write_text(damage((tmp_path / "bundle").read_text()))
        assert_error(run("import", tmp_path / "bundle", "--root", tmp_path / "other"), message)
        assert not (tmp_path / "other").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"op": "../../../escape"}, "entry 1: op: '../../../escape' is not a plain name"),
            ({"backend": "other"}, "entry 1: the choice other[default] is not among"),
            ({"environment": "0" * 16}, "entry 1: its environment 0000000000000000 is not in the bundle"),
        ],
    )
    def test_one_invalid_entry_refuses_the_bundle(self, root, tmp_path, change, message):
        entries = [make_entry().to_dict(), {**make_entry(9).to_dict(), **change}]
        body = {"environments": {HERE.hash: HERE.to_dict()}, "entries": entries}
        (tmp_path / "bundle").write_text(seal("bundle", body))
        assert_error(run("import", tmp_path / "bundle", "--root", root), message)
        assert not root.exists()

    def test_what_cannot_be_read_or_written_is_one_line(self, root, fill, tmp_path):
        fill(make_entry())
        (tmp_path / "file").write_text("")
        assert_error(run("import", tmp_path / "none", "--root", root), "no such file")
        assert_error(run("import", tmp_path, "--root", root), "Is a directory")
        assert_error(run("export", tmp_path / "file" / "x", "--root", root), "Not a directory")
        run("export", tmp_path / "bundle", "--root", root)
        assert_error(run("import", tmp_path / "bundle", "--root", tmp_path / "file"), "cannot write")


class TestMerge:
    def test_the_newer_measurement_of_a_key_wins(self, root, fill, tmp_path):
        mine = [make_entry(1, created="2025-11-02T10:00:00+02:00"), make_entry(2), make_entry(3)]
        theirs = [
            make_entry(1, "some_op", "torch", created="2025-11-02T09:00:00+00:00"),  # an hour later, in UTC
            make_entry(2, "some_op", "torch", created="2025-11-01"),
            make_entry(4),
        ]
        fill(*mine)
        fill(*theirs, to=tmp_path / "b")
        result = run("merge", tmp_path / "b", "--root", root)
        assert result.exit_code == 0
        assert "1 added, 1 replaced, 1 kept" in result.stdout
        found = {
            entry.key["N"]: entry.backend
            for entry in (
                Layer("explicit", root).read(HERE.hash, "some_op", make_entry(n).key_hash) for n in (1, 2, 3, 4)
            )
        }
        assert found == {1: "torch", 2: "numba", 3: "numba", 4: "numba"}

    def test_a_damaged_entry_of_ours_is_replaced(self, root, fill, tmp_path):
        (path,) = fill(make_entry())
        path.write_text("{")
        fill(make_entry(created="2001-01-01"), to=tmp_path / "b")
        assert "0 added, 1 replaced, 0 kept" in run("merge", tmp_path / "b", "--root", root).stdout

    def test_a_missing_source_is_an_error(self, root):
        assert_error(run("merge", root / "none", "--root", root), "is not a directory")


class TestPrune:
    def test_without_options_only_abandoned_temporaries_go(self, root, fill):
        (path,) = fill(make_entry())
        stray = path.with_name(".x.tmp")
        stray.write_text("")
        os.utime(stray, (time.time() - 3700,) * 2)
        result = run("prune", "--root", root)
        assert result.exit_code == 0
        assert f"{stray}: abandoned temporary file\n1 files removed" in result.stdout
        assert path.exists()
        assert not stray.exists()

    def test_other_environments(self, root, fill, monkeypatch):
        monkeypatch.setattr(cli, "local_environments", lambda: (HERE,))
        (kept,) = fill(make_entry())
        (gone,) = fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        result = run("prune", "--root", root, "--other-environments")
        assert f"{gone}: other environment (versions.torch)" in result.stdout
        assert kept.exists()
        assert not gone.parents[2].exists()

    def test_stale_asks_the_registry_for_current_fingerprints(self, root, fill, monkeypatch):
        def backends(op):
            if op != "some_op":
                raise UnknownNameError("op", op, ["some_op"])
            return {"numba": types.SimpleNamespace(fingerprint=lambda: "n2")}

        monkeypatch.setattr(registry, "backends", backends)
        gone, kept, unknown = fill(make_entry(), make_entry(9, fingerprint="n2"), make_entry(op="third_party_op"))
        result = run("prune", "--root", root, "--stale")
        assert f"{gone}: stale: backend 'numba' has changed" in result.stdout
        assert [path.exists() for path in (gone, kept, unknown)] == [False, True, True]

    def test_older_than(self, root, fill):
        now = datetime.now(UTC)
        young = make_entry(1, created=(now - timedelta(days=1)).isoformat())
        old = make_entry(2, created=(now - timedelta(days=3)).isoformat())
        young_path, old_path = fill(young, old)
        run("prune", "--root", root, "--older-than", "2")
        assert young_path.exists()
        assert not old_path.exists()
        assert run("prune", "--root", root, "--older-than", "-1").exit_code == 2

    @pytest.mark.parametrize("days", ["1e10", "inf"])
    def test_a_number_of_days_that_no_calendar_has_is_refused(self, root, fill, days):
        (path,) = fill(make_entry(created="2001-01-01"))
        result = run("prune", "--root", root, "--older-than", days)
        assert_error(result, "--older-than: expected a number of days, at most 999999999")
        assert path.exists()

    def test_after_invalid_files_are_pruned_verify_is_content(self, root, fill):
        path, _ = fill(make_entry(), make_entry(9))
        path.write_text("{")
        path.with_name("notes.json").write_text("x")
        assert run("verify", "--root", root).exit_code == 1
        assert "2 files removed" in run("prune", "--root", root, "--invalid").stdout
        assert run("verify", "--root", root).exit_code == 0

    def test_after_another_environment_is_pruned_verify_is_content(self, root, fill, monkeypatch):
        monkeypatch.setattr(cli, "local_environments", lambda: (HERE,))
        (path,) = fill(make_entry(environment=ELSEWHERE), environment=ELSEWHERE)
        journal = path.parents[2] / "journal" / "some_op-0.jsonl"
        journal.parent.mkdir()
        journal.write_text("{}\n")
        assert "3 files removed" in run("prune", "--root", root, "--other-environments").stdout
        assert run("verify", "--root", root).exit_code == 0

    def test_dry_run_says_the_same_and_removes_nothing(self, root, fill):
        (path,) = fill(make_entry(created="2001-01-01"))
        result = run("prune", "--root", root, "--older-than", "2", "--dry-run")
        assert f"{path}: measured 2001-01-01\n1 files would be removed" in result.stdout
        assert path.exists()

    def test_a_file_that_cannot_be_removed_is_one_line(self, root, fill, monkeypatch):
        fill(make_entry(created="2001-01-01"))

        def refuse(removals):
            raise PermissionError(13, "Permission denied", str(removals[0].path))

        assert cli.remove is prune.remove
        monkeypatch.setattr(cli, "remove", refuse)
        assert_error(run("prune", "--root", root, "--older-than", "2"), "Permission denied")


class TestVerify:
    def test_a_sound_store(self, root, fill):
        fill(make_entry(), make_entry(9))
        result = run("verify", "--root", root)
        assert (result.exit_code, result.stdout) == (0, "3 files checked, 0 invalid\n")

    def test_names_every_invalid_file_and_exits_with_1(self, root, fill):
        sound, flipped, newer = fill(make_entry(), make_entry(9), make_entry(10))
        flipped.write_text(flipped.read_text().replace("20.0", "21.0", 1))
        newer.write_text(json.dumps({**json.loads(newer.read_text()), "schema": 2}))
        result = run("verify", "--root", root)
        assert result.exit_code == 1
        assert f"{flipped}: checksum does not match" in result.stderr
        assert f"{newer}: schema 2 is newer" in result.stderr
        assert str(sound) not in result.stderr
        assert "4 files checked, 2 invalid" in result.stdout

    def test_a_first_warm_up_that_was_killed_is_no_damage(self, root):
        journal = Layer("explicit", root).schema_root / HERE.hash / "journal" / "some_op-0.jsonl"
        journal.parent.mkdir(parents=True)
        journal.write_text("{}\n")
        result = run("verify", "--root", root)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "0 files checked, 0 invalid\n", "")

    def test_entries_without_a_manifest_are(self, root, fill):
        fill(make_entry())
        Layer("explicit", root).manifest_path(HERE.hash).unlink()
        result = run("verify", "--root", root)
        assert result.exit_code == 1
        assert "manifest.json: missing: " in result.stderr

    def test_strays_are_named_and_fail_nothing(self, root, fill):
        (path,) = fill(make_entry())
        path.with_name(".DS_Store").write_text("x")
        (path.parents[1] / "notes.txt").write_text("x")
        result = run("verify", "--root", root)
        assert (result.exit_code, result.stdout) == (0, "2 files checked, 0 invalid, 2 strays beside them\n")
        assert f"{path.with_name('.DS_Store')}: stray, " in result.stderr


class TestPath:
    def test_names_layers_roots_and_use(self, tmp_path, monkeypatch):
        (tmp_path / "mine").mkdir()
        monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path / "mine"))
        monkeypatch.setenv("ISOKERN_SITE_CACHE", str(tmp_path / "site"))
        result = run("path")
        assert result.exit_code == 0
        rows = [line.split("\t") for line in result.stdout.splitlines()]
        assert [row[0] for row in rows] == ["explicit", "user", "site", "shipped"]
        assert rows[0] == ["explicit", str(tmp_path / "mine"), "written"]
        assert rows[2] == ["site", str(tmp_path / "site"), "read, does not exist"]

    def test_of_an_explicit_root(self, root):
        assert run("path", "--root", root).stdout == f"explicit\t{root}\twritten, does not exist\n"


def test_a_misused_command_is_exit_2():
    assert run("show").exit_code == 2
    assert run("forget").exit_code == 2
