"""Records of the tuning store: what they accept, what they refuse, and what decides their hashes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isokern.cache import silicon
from isokern.cache.candidate import CandidateRecord, config_label
from isokern.cache.codec import SCHEMA, InvalidRecordError, canonical, seal, unseal
from isokern.cache.compare import ABSENT, differences
from isokern.cache.entry import Entry, key_hash
from isokern.cache.environment import Environment, current_environment
from isokern.cache.silicon import CpuSilicon, CudaSilicon, parse_cpuinfo
from isokern.errors import ArgumentValueError, StoreError
from isokern.registry.decision import RejectCode

H100 = Environment(
    device="cuda",
    silicon=CudaSilicon("9.0", 132, 79),
    threads=0,
    driver="13.0",
    versions=(("torch", "2.13.0"), ("triton", "3.7.0")),
    python="3.11",
    labels=(("product", "NVIDIA H100 80GB HBM3"),),
)
MEASURED = {
    "policy": "graph",
    "method": "events around a replayed graph",
    "launches": 480,
    "seconds": 1.5,
    "created": "2025-11-02T10:00:00+00:00",
    "isokern": "0.1.0",
}
FAST = CandidateRecord("triton", {"warps": 4}, "ok", None, None, 10.5, (10.5, 10.25, 11.0), "f1", ("repeatable",))
SLOW = CandidateRecord("torch", {}, "ok", None, None, 42.0, (42.0,), "f2")
WRONG = CandidateRecord("cupy", {"tile": 32}, "rejected", "wrong", "state of slot 3 off by 0.5", fingerprint="f3")


def entry(**changes: object) -> Entry:
    values = {
        "op": "some_op",
        "contract_version": 2,
        "key": {"K": 128, "scale": 0.5, "kda": False, "dtype": "bf16", "policy": "graph"},
        "backend": "triton",
        "config": {"warps": 4},
        "margin_over_runner_up": 0.75,
        "margin_over_default": None,
        "rule": "beat the default by more than 3 %",
        "candidates": (FAST, SLOW, WRONG),
        "measured": MEASURED,
        "environment": H100.hash,
    }
    return Entry(**{**values, **changes})


#: Two devices, of which the functions that the probe needs know something.
DRIVER = """
#include <stdio.h>
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return 0;
}
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 85017493504UL; return 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Stand-in %d", device) < 0; }
int cuGetErrorString(int code, const char **text) { *text = "stand-in error"; return 0; }
"""


class TestEnvironment:
    def test_survives_json(self):
        again = Environment.from_dict(json.loads(json.dumps(H100.to_dict())))
        assert (again, again.hash, again.labels) == (H100, H100.hash, H100.labels)

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("silicon.capability", {"silicon": CudaSilicon("10.0", 132, 79)}),
            ("silicon.sm_count", {"silicon": CudaSilicon("9.0", 114, 79)}),
            ("silicon.memory_gib", {"silicon": CudaSilicon("9.0", 132, 140)}),
            ("driver", {"driver": "12.8"}),
            ("versions.triton", {"versions": (("torch", "2.13.0"), ("triton", "3.6.0"))}),
            ("versions.triton", {"versions": (("torch", "2.13.0"),)}),
            ("python", {"python": "3.12"}),
        ],
    )
    def test_each_identifying_field_changes_the_hash_and_shows_in_the_diff(self, field, change):
        other = dataclasses.replace(H100, **change)
        assert other.hash != H100.hash
        assert list(H100.diff(other)) == [field]

    def test_product_labels_are_recorded_and_decide_nothing(self):
        other = dataclasses.replace(H100, labels=(("product", "NVIDIA H100 PCIe"),))
        assert other == H100
        assert other.hash == H100.hash
        assert H100.diff(other) == {}

    def test_order_of_versions_decides_nothing(self):
        assert dataclasses.replace(H100, versions=tuple(reversed(H100.versions))) == H100

    def test_hash_is_pinned_so_that_stores_outlive_a_refactoring(self):
        assert H100.hash == "e197b9e1983b80c5"

    def test_cpu_names_its_cores_threads_and_instruction_sets(self):
        here = current_environment("cpu", threads=3)
        assert here.device == "cpu"
        assert here.threads == 3
        assert here.silicon.logical_cores >= 1
        assert "torch" in dict(here.versions)
        assert here.hash != current_environment("cpu", threads=4).hash

    def test_threads_are_asked_of_torch_if_not_given(self):
        assert current_environment("cpu").threads == torch.get_num_threads()

    @pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", ""])
    def test_an_unknown_device_is_an_argument_error(self, device):
        with pytest.raises(ArgumentValueError, match="device: expected 'cpu', 'cuda' or 'cuda:N'"):
            current_environment(device)

    def test_a_missing_cuda_device_is_a_store_error(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        silicon._probe.cache_clear()
        with pytest.raises(StoreError, match="no CUDA device"):
            current_environment("cuda")

    def test_a_process_without_cuda_asks_another_one_and_stays_without(self, monkeypatch):
        facts = {"major": 9, "minor": 0, "sm_count": 132, "memory_bytes": 85_017_493_504, "name": "NVIDIA H100"}
        asked = []

        def run(command, **options):
            asked.append(command)
            return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

        monkeypatch.setattr(silicon.subprocess, "run", run)
        silicon._probe.cache_clear()
        try:
            here = current_environment("cuda:3")
        finally:
            silicon._probe.cache_clear()
        assert here.silicon == CudaSilicon("9.0", 132, 79)
        assert (asked[0][1], asked[0][-1]) == ("-I", "3"), "isolated, and for that device"
        assert not torch.cuda.is_initialized()

    def test_what_is_asked_ahead_is_asked_once_and_waited_for(self, monkeypatch):
        facts = {"major": 9, "minor": 0, "sm_count": 132, "memory_bytes": 85_017_493_504, "name": "NVIDIA H100"}
        asked, begun, answer = [], threading.Event(), threading.Event()

        def run(command, **options):
            asked.append(command[-1])
            begun.set()
            assert answer.wait(20)
            return subprocess.CompletedProcess(command, 0, json.dumps(facts), "")

        monkeypatch.setattr(silicon.subprocess, "run", run)
        monkeypatch.delitem(sys.modules, "torch")  # where it is loaded there is nothing to wait for meanwhile
        silicon._probe.cache_clear()
        try:
            silicon.ask_ahead("cpu")
            silicon.ask_ahead("cuda:3")
            assert begun.wait(20)
            threading.Timer(0.05, answer.set).start()
            assert silicon.read_cuda(3) == (CudaSilicon("9.0", 132, 79), "NVIDIA H100")
        finally:
            silicon._probe.cache_clear()
        assert asked == ["3"]

    def test_the_probe_talks_to_the_driver_alone(self, tmp_path):
        """Against a stand-in for libcuda: the calls, their order and the attributes' numbers."""
        source = tmp_path / "cuda.c"
        source.write_text(DRIVER)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), str(source)], check=True)
        script = Path(silicon.__file__).with_name("cuda_probe.py")
        environment = {"LD_LIBRARY_PATH": str(tmp_path)}

        def ask(index):
            command = [sys.executable, "-I", str(script), index]
            return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

        found = ask("1")
        assert json.loads(found.stdout) == {
            "major": 9, "minor": 0, "sm_count": 132, "memory_bytes": 85017493504, "name": "Stand-in 1"
        }  # fmt: skip
        missing = ask("2")
        assert missing.returncode == 1
        assert "cuda:2 does not exist: this process sees 2" in missing.stderr

    def test_a_cuda_device_is_read_without_its_name(self, monkeypatch):
        found = type("P", (), {"major": 9, "minor": 0, "multi_processor_count": 132, "name": "NVIDIA H200"})
        found.total_memory = 150_754_820_096  # 140.4 GiB
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        here = current_environment("cuda:1", threads=7)
        assert here.silicon == CudaSilicon("9.0", 132, 140)
        assert here.threads == 0, "host threads decide nothing on CUDA"
        assert dict(here.labels)["product"] == "NVIDIA H200"
        with pytest.raises(StoreError, match="cuda:2 does not exist"):
            current_environment("cuda:2")

    def test_cpuinfo_of_both_architectures(self):
        x86 = "processor : 0\nmodel name : AMD EPYC\nflags : fpu avx2 avx512f sse2 amx_bf16\n\nprocessor : 1\n"
        assert parse_cpuinfo(x86) == ("AMD EPYC", ("amx_bf16", "avx2", "avx512f"))
        assert parse_cpuinfo("processor : 0\nFeatures : fp asimd sve crc32\n") == ("", ("asimd", "sve"))
        assert parse_cpuinfo("") == ("", ())

    def test_device_and_silicon_must_agree(self):
        with pytest.raises(InvalidRecordError, match="device 'cuda' with CpuSilicon"):
            dataclasses.replace(H100, silicon=CpuSilicon("x86_64", 2, ()))


class TestEntry:
    def test_survives_json_exactly(self):
        assert Entry.from_json(entry().to_json()) == entry()

    def test_equal_entries_are_equal_bytes_whatever_the_order_of_their_fields(self):
        shuffled = entry(key=dict(reversed(entry().key.items())))
        assert shuffled.to_json() == entry().to_json()

    def test_key_hash_is_pinned_so_that_stores_outlive_a_refactoring(self):
        assert entry().key_hash == "9c186b1917007f58"

    @pytest.mark.parametrize("other", [True, 1.0, "1"])
    def test_key_hash_tells_types_apart(self, other):
        assert key_hash("op", 1, {"x": 1}) != key_hash("op", 1, {"x": other})

    def test_key_hash_depends_on_op_and_contract(self):
        assert len({key_hash("a", 1, {}), key_hash("b", 1, {}), key_hash("a", 2, {})}) == 3

    @given(
        st.dictionaries(
            st.text().filter(lambda name: name != "policy"),
            st.integers() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        )
    )
    def test_any_finite_key_survives_json(self, key):
        again = Entry.from_json(entry(key=key).to_json())
        assert again.key == key
        assert again.key_hash == key_hash("some_op", 2, key)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"op": "../../etc"}, "not a plain name"),
            ({"op": ".hidden"}, "not a plain name"),
            ({"environment": "../x"}, "16 hex digits"),
            ({"key": {"scale": math.nan}}, "not a finite scalar"),
            ({"key": {"shape": (1, 2)}}, "not a finite scalar"),
            ({"key": {"N": 10**400}}, "N=an integer of 1329 bits is not a finite scalar"),
            ({"config": {"warps": 8}}, "not among the candidates"),
            ({"backend": "cupy", "config": {"tile": 32}}, "not among the candidates that are ok"),
            ({"config": {"warps": 4.0}}, "not among the candidates"),
            ({"margin_over_default": math.inf}, "finite number"),
            ({"margin_over_default": 10**400}, "finite number, given an integer of 1329 bits"),
            ({"candidates": (FAST, FAST)}, "listed twice"),
            ({"measured": {**MEASURED, "policy": "warm"}}, "expected one of"),
            ({"measured": {**MEASURED, "policy": "eager"}}, "another policy"),
            ({"measured": {**MEASURED, "created": "yesterday"}}, "ISO 8601"),
            ({"measured": {**MEASURED, "seconds": math.nan}}, "finite number"),
            ({"measured": {**MEASURED, "host": "x"}}, "unknown field"),
            ({"measured": {}}, "missing or unknown field"),
        ],
    )
    def test_contradictions_are_refused(self, change, message):
        with pytest.raises(InvalidRecordError, match=message):
            entry(**change)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (("b", {}, "maybe"), "status"),
            (("b", {}, "ok", "wrong"), "is ok and carries the code"),
            (("b", {}, "rejected"), "unknown code None"),
            (("b", {}, "rejected", "bad luck"), "unknown code 'bad luck'"),
            (("b", {}, "ok", None, None, math.nan), "finite"),
            (("b", {}, "ok", None, None, 10**400), "finite"),
            (("b", {}, "ok", None, None, 1.0, (1.0, math.inf)), "finite"),
            (("b", {"x": [1]}, "ok"), "finite scalar"),
        ],
    )
    def test_contradicting_candidates_are_refused(self, fields, message):
        with pytest.raises(InvalidRecordError, match=message):
            CandidateRecord(*fields)

    @pytest.mark.parametrize("code", list(RejectCode))
    def test_every_reject_code_can_be_stored(self, code):
        rejected = CandidateRecord("b", {}, "rejected", code, "because")
        assert CandidateRecord.from_dict(json.loads(json.dumps(rejected.to_dict()))) == rejected

    def test_a_date_without_a_zone_is_utc(self):
        naive = entry(measured={**MEASURED, "created": "2025-11-02T10:00:00"})
        assert naive.created == entry().created

    def test_staleness_is_by_backend(self):
        now = {"triton": "f1", "torch": "changed", "cupy": "f3"}
        assert entry().stale_backends(now) == ("torch",)
        assert entry().stale_backends({"triton": "f1"}) == (), "a backend that is gone has not changed"
        assert entry().fresh_candidates(now) == (FAST, WRONG)
        assert entry().fresh_candidates({"triton": "f1"}) == (FAST,)

    def test_labels_read_like_a_call(self):
        assert entry().label == "triton[warps=4]"
        assert config_label({}) == "default"


class TestFileFormat:
    def test_a_flipped_bit_anywhere_is_noticed(self):
        text = entry().to_json().encode()
        for position in range(len(text) - 1):  # the last byte is the newline
            damaged = bytearray(text)
            damaged[position] ^= 1
            with pytest.raises(InvalidRecordError):
                Entry.from_json(bytes(damaged))

    def test_every_truncation_is_noticed(self):
        text = entry().to_json().encode()
        for length in range(len(text) - 1):
            with pytest.raises(InvalidRecordError):
                Entry.from_json(text[:length])

    @pytest.mark.parametrize(("schema", "age"), [(SCHEMA + 1, "newer"), (SCHEMA - 1, "older")])
    def test_another_schema_is_named(self, schema, age):
        envelope = {**json.loads(entry().to_json()), "schema": schema}
        with pytest.raises(InvalidRecordError, match=f"schema {schema} is {age} than {SCHEMA}"):
            Entry.from_json(json.dumps(envelope))

    @pytest.mark.parametrize(
        "text", ["", "null", "[]", "[" * 100_000, '{"schema":1,"x":NaN}', '{"schema":true}', "\x00" * 100]
    )
    def test_garbage_is_an_invalid_record(self, text):
        with pytest.raises(InvalidRecordError):
            Entry.from_json(text)

    def test_a_file_of_another_kind_is_named(self):
        with pytest.raises(InvalidRecordError, match="expected kind 'entry', found 'plan'"):
            unseal("entry", seal("plan", {}))

    def test_valid_checksum_over_an_invalid_body_is_refused_by_field(self):
        for name in entry().to_dict():
            body = entry().to_dict()
            if name.startswith("margin"):
                continue  # may be absent
            del body[name]
            with pytest.raises(InvalidRecordError, match=f"'{name}' is missing"):
                Entry.from_json(seal("entry", body))

    def test_nan_has_no_text(self):
        with pytest.raises(InvalidRecordError, match="not storable"):
            canonical({"x": math.nan})


def test_differences_tell_types_apart_and_name_what_is_absent():
    found = differences({"a": {"x": 1, "y": 2}, "b": True}, {"a": {"x": 1.0, "y": 2}, "c": 3})
    assert found == {"a.x": (1, 1.0), "b": (True, ABSENT), "c": (ABSENT, 3)}


def test_importing_the_cache_imports_no_framework():
    code = (
        "import sys, isokern.cache.cli; "
        "print([m for m in ('torch', 'numpy', 'numba', 'triton', 'cupy') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
