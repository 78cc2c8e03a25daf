"""Plans, which ranks compare by hash, and the journal of a tuning run, which survives being killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import warnings

import pytest

from isokern.cache.candidate import CandidateRecord
from isokern.cache.codec import InvalidRecordError, seal, unseal
from isokern.cache.entry import Entry
from isokern.cache.environment import Environment
from isokern.cache.journal import Journal
from isokern.cache.layer import Layer
from isokern.cache.plan import Choice, Plan
from isokern.cache.silicon import CpuSilicon
from isokern.cache.store import CacheWarning, Store
from isokern.errors import PlanError

HERE = Environment("cpu", CpuSilicon("x86_64", 8, ("avx2",)), 8, "", (("torch", "2.13.0"),), "3.11")
DECODE = Choice("some_op", 1, {"N": 8}, "numba", {"block": 4}, "n1")
PROMPT = Choice("some_op", 1, {"N": 1}, "torch", {}, "t1")
OTHER = Choice("other_op", 3, {"N": 1}, "torch", {}, "t9")


class TestPlan:
    def test_survives_the_disk(self, tmp_path):
        plan = Plan(HERE, (DECODE, PROMPT, OTHER))
        plan.save(tmp_path / "deep" / "plan.json")
        again = Plan.load(tmp_path / "deep" / "plan.json", HERE)
        assert again == plan
        assert again.content_hash == plan.content_hash

    def test_lookup_is_by_op_contract_and_key(self):
        plan = Plan(HERE, (DECODE, PROMPT, OTHER))
        assert plan.lookup("some_op", 1, {"N": 8}) == DECODE
        assert plan.lookup("other_op", 3, {"N": 1}) == OTHER
        assert plan.lookup("some_op", 2, {"N": 8}) is None
        assert plan.lookup("some_op", 1, {"N": 8.0}) is None

    def test_the_order_choices_come_in_does_not_matter(self):
        plans = [Plan(HERE, order) for order in itertools.permutations((DECODE, PROMPT, OTHER))]
        assert len({plan.content_hash for plan in plans}) == 1
        assert all(plan == plans[0] for plan in plans)

    @pytest.mark.parametrize(
        "change",
        [
            {"op": "x"},
            {"contract_version": 2},
            {"key": {"N": 9}},
            {"backend": "x"},
            {"config": {"block": 8}},
            {"fingerprint": "n2"},
        ],
    )
    def test_every_field_of_a_choice_is_in_the_hash(self, change):
        assert Plan(HERE, (dataclasses.replace(DECODE, **change),)).content_hash != Plan(HERE, (DECODE,)).content_hash

    def test_so_is_the_environment_but_not_its_labels(self):
        plan = Plan(HERE, (DECODE,))
        assert Plan(dataclasses.replace(HERE, threads=4), (DECODE,)).content_hash != plan.content_hash
        relabelled = dataclasses.replace(HERE, labels=(("product", "x"),))
        assert Plan(relabelled, (DECODE,)).content_hash == plan.content_hash

    def test_two_choices_for_one_key_are_refused(self):
        with pytest.raises(PlanError, match=r"two choices for one key.*numba\[block=4\] and torch\[default\]"):
            Plan(HERE, (DECODE, dataclasses.replace(PROMPT, key={"N": 8})))

    def test_a_choice_that_cannot_be_stored_is_refused(self):
        with pytest.raises(PlanError, match="cannot be stored"):
            Plan(HERE, (dataclasses.replace(DECODE, config={"x": float("nan")}),))

    def test_a_file_altered_by_hand_is_refused(self, tmp_path):
        file = tmp_path / "plan.json"
        Plan(HERE, (DECODE,)).save(file)
        file.write_text(file.read_text().replace('"block":4', '"block":8'))
        with pytest.raises(PlanError, match="checksum"):
            Plan.load(file)

    def test_a_file_altered_with_a_new_checksum_is_refused_by_its_content_hash(self, tmp_path):
        file = tmp_path / "plan.json"
        Plan(HERE, (DECODE,)).save(file)
        body = unseal("plan", file.read_text())
        body["choices"][0]["backend"] = "torch"
        file.write_text(seal("plan", body))
        with pytest.raises(PlanError, match="content hash"):
            Plan.load(file)

    def test_another_environment_is_refused_field_by_field_when_asked(self, tmp_path):
        file = tmp_path / "plan.json"
        Plan(HERE, (DECODE,)).save(file)
        here = dataclasses.replace(HERE, threads=4, versions=(("torch", "2.12.0"),))
        message = "another environment (threads: plan 8, here 4; versions.torch: plan '2.13.0', here '2.12.0')"
        with pytest.raises(PlanError) as caught:
            Plan.load(file, here)
        assert message in str(caught.value)
        assert Plan.load(file).lookup("some_op", 1, {"N": 8}) == DECODE

    @pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"schema": 9, "kind": "plan"})])
    def test_an_unreadable_file_is_a_plan_error_naming_it(self, tmp_path, text):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError, match=r"plan\.json"):
            Plan.load(tmp_path / "plan.json")

    def test_so_are_a_missing_one_a_directory_and_one_that_cannot_be_written(self, tmp_path):
        with pytest.raises(PlanError, match="no such file"):
            Plan.load(tmp_path / "none.json")
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(PlanError, match="cannot write plan"):
            Plan(HERE, ()).save(tmp_path / "file" / "plan.json")

    def test_from_store_takes_what_get_would_return(self, tmp_path):
        def entry(n, backend, fingerprint, environment=HERE):
            won = CandidateRecord(backend, {}, "ok", None, None, 1.0, (1.0,), fingerprint)
            measured = {"policy": "eager", "method": "", "launches": 1, "seconds": 1}
            measured |= {"created": "2025-11-02", "isokern": "0.1.0"}
            fields = ("some_op", 1, {"n": n}, backend, {}, None, None, "", (won,), measured, environment.hash)
            return Entry(*fields)

        user, site = Layer("user", tmp_path / "u", writable=True), Layer("site", tmp_path / "s")
        elsewhere = dataclasses.replace(HERE, threads=1)
        user.write(entry(1, "user_choice", "u1"), HERE)
        site.write(entry(1, "site_choice", "s1"), HERE)
        site.write(entry(2, "site_choice", "s1"), HERE)
        user.write(entry(3, "user_choice", "u1", elsewhere), elsewhere)
        store = Store([user, site])
        found = {c.key["n"]: (c.backend, c.fingerprint) for c in Plan.from_store(store, HERE).choices}
        assert found == {1: ("user_choice", "u1"), 2: ("site_choice", "s1")}
        current = {"some_op": {"user_choice": "u2", "site_choice": "s1"}}
        found = {c.key["n"]: c.backend for c in Plan.from_store(store, HERE, current).choices}
        assert found == {1: "site_choice", 2: "site_choice"}


class TestJournal:
    def test_records_come_back_in_order_in_another_process(self, tmp_path):
        journal = Journal(tmp_path / "deep" / "journal")
        assert journal.records() == ()
        for step in range(3):
            journal.append({"step": step, "samples": [1.5, 2.5]})
        assert [record["step"] for record in Journal(journal.path).records()] == [0, 1, 2]

    def test_every_torn_last_line_costs_that_step_alone(self, tmp_path):
        whole = b'{"step":0}\n'
        last = b'{"step":1,"text":"}\\n{"}\n'
        for length in range(len(last) - 1):
            (tmp_path / "journal").write_bytes(whole + last[:length])
            journal = Journal(tmp_path / "journal")
            assert journal.records() == ({"step": 0},)
            journal.append({"step": 2})
            assert journal.records() == ({"step": 0}, {"step": 2}), "what follows a torn line is not lost"

    def test_appends_of_several_processes_do_not_mix(self, tmp_path):
        code = (
            "import sys; from isokern.cache import Journal\n"
            "for step in range(30): Journal(sys.argv[1]).append({'who': sys.argv[2], 'step': step, 'x': 'x' * 3000})"
        )
        path = str(tmp_path / "journal")
        writers = [subprocess.Popen([sys.executable, "-c", code, path, who]) for who in "abc"]
        assert [writer.wait(60) for writer in writers] == [0, 0, 0]
        found = [(record["who"], record["step"]) for record in Journal(path).records()]
        assert sorted(found) == [(who, step) for who in "abc" for step in range(30)]
        assert [step for who, step in found if who == "b"] == list(range(30))

    def test_discard_removes_it_and_may_be_repeated(self, tmp_path):
        journal = Journal(tmp_path / "journal")
        journal.append({"step": 0})
        journal.discard()
        journal.discard()
        assert not journal.path.exists()
        assert journal.records() == ()

    def test_nan_is_refused_before_anything_is_written(self, tmp_path):
        journal = Journal(tmp_path / "journal")
        with pytest.raises(InvalidRecordError):
            journal.append({"time": float("nan")})
        assert not journal.path.exists()

    def test_without_a_disk_it_warns_once_and_goes_on_in_memory(self, tmp_path):
        (tmp_path / "file").write_text("")
        journal = Journal(tmp_path / "file" / "journal")
        with pytest.warns(CacheWarning, match="cannot be resumed"):
            journal.append({"step": 0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            journal.append({"step": 1})
        assert journal.records() == ({"step": 0}, {"step": 1})

    def test_a_disk_that_takes_half_a_record_is_a_disk_that_failed(self, tmp_path, monkeypatch):
        journal = Journal(tmp_path / "journal")
        journal.append({"step": 0})
        real = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: len(data) // 2]))
        with pytest.warns(CacheWarning, match="only part"):
            journal.append({"step": 1})
        monkeypatch.undo()
        journal.append({"step": 2})
        assert sorted(record["step"] for record in journal.records()) == [0, 1, 2]
        assert [record["step"] for record in Journal(journal.path).records()] == [0, 2]
