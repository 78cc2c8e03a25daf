"""Which GPU of the host a device is, however a process came to see it, and that the lock goes by that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from isokern.autotune import gpu_identity
from isokern.autotune.device_lock import device_lock
from isokern.autotune.fleet_process import Slot, local_slots
from isokern.autotune.fleet_ranks import claim_local_device
from isokern.autotune.gpu_identity import physical_name, visible_entries

#: A host of eight GPUs, with UUIDs that end in their index; CUDA_VISIBLE_DEVICES is read as far as "4,5".
DRIVER = """
#include <stdlib.h>
#include <string.h>
static int listed[8], count;
int cuInit(unsigned flags) {
  const char *text = getenv("CUDA_VISIBLE_DEVICES");
  if (getenv("BROKEN_DRIVER")) return 999;
  if (!text) text = "0,1,2,3,4,5,6,7";
  for (count = 0; *text; text++) if (*text != ',') listed[count++] = *text - '0';
  return flags;
}
int cuDeviceGetCount(int *found) { *found = count; return 0; }
int cuDeviceGet(int *device, int index) { *device = listed[index]; return 0; }
static int uuid(unsigned char *bytes, int device, int slice) {
  memset(bytes, 0, 16);
  bytes[0] = slice;
  bytes[15] = device;
  return 0;
}
int cuDeviceGetUuid(unsigned char *bytes, int device) { return uuid(bytes, device, 0); }
#ifndef OLD
int cuDeviceGetUuid_v2(unsigned char *bytes, int device) { return uuid(bytes, device, 0xab); }
#endif
"""


class Waits(Exception):
    """Somebody else has the lock."""


def raise_waits(text: str) -> None:
    raise Waits(text)


def libcuda(folder: Path, *options: str) -> str:
    (folder / "cuda.c").write_text(DRIVER)
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", *options, "-o", str(library), str(folder / "cuda.c")], check=True)
    return str(folder)


def gpu(index: int) -> str:
    return f"GPU-ab000000-0000-0000-0000-00000000000{index}"


@pytest.fixture(autouse=True)
def one_gpu_host_per_test(monkeypatch, tmp_path):
    """Locks and variables of each test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    asked = gpu_identity._uuids
    asked.cache_clear()
    yield
    asked.cache_clear()


@pytest.fixture
def eight_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("LD_LIBRARY_PATH", libcuda(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible_entries() or range(8)))


@pytest.fixture
def nobody_tells(monkeypatch):
    monkeypatch.setattr(gpu_identity, "_uuids", lambda visible, order: ())


def test_the_probe_talks_to_the_driver_alone(tmp_path):
    script = Path(gpu_identity.__file__).with_name("gpu_probe.py")

    def ask(**variables):
        environment = {"LD_LIBRARY_PATH": str(tmp_path), **variables}
        command = [sys.executable, "-I", str(script)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    libcuda(tmp_path)
    assert json.loads(ask(CUDA_VISIBLE_DEVICES="5,2").stdout) == [gpu(5)[4:], gpu(2)[4:]]
    broken = ask(BROKEN_DRIVER="1")
    assert (broken.returncode, broken.stderr) == (1, "cuInit fails with error 999\n")
    libcuda(tmp_path, "-DOLD")
    assert json.loads(ask(CUDA_VISIBLE_DEVICES="5").stdout) == ["00000000-0000-0000-0000-000000000005"]


def test_a_gpu_has_one_name_whatever_index_a_process_knows_it_by(eight_gpus, monkeypatch):
    assert physical_name("cuda") == physical_name("cuda:0") == gpu(0)
    assert physical_name("cuda:5") == gpu(5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert physical_name("cuda") == gpu(4)
    assert physical_name("cuda:1") == gpu(5)
    assert not torch.cuda.is_initialized()


def test_what_is_no_cuda_device_or_named_already_stands_for_itself(eight_gpus):
    for name in ("cpu", "cpu-left", gpu(3), "GPU-3"):
        assert physical_name(name) == name


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        (None, "cuda", "GPU-0"),
        (None, "cuda:3", "GPU-3"),
        ("4,5", "cuda", "GPU-4"),
        ("4, 5", "cuda:1", "GPU-5"),
        ("GPU-8932f937-d72c", "cuda", "GPU-8932f937-d72c"),
        ("MIG-GPU-8932f937/1/0", "cuda:0", "MIG-GPU-8932f937/1/0"),
    ],
)
def test_where_nobody_tells_uuids_the_variables_entry_is_the_name(nobody_tells, monkeypatch, visible, device, name):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert physical_name(device) == name
    assert physical_name(name) == name, "a slot's lock is named in one process and taken in another"


def test_a_driver_that_does_not_start_tells_no_uuids(eight_gpus, monkeypatch):
    monkeypatch.setenv("BROKEN_DRIVER", "1")
    assert physical_name("cuda:3") == "GPU-3"


@pytest.mark.parametrize(
    ("text", "entries"),
    [("0,2", ("0", "2")), ("", ()), ("-1", ()), ("3,-1,2", ("3",)), ("NoDevFiles", ()), (" 1 , GPU-a", ("1", "GPU-a"))],
)
def test_visible_devices_are_read_as_cuda_reads_them(monkeypatch, text, entries):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert visible_entries() == entries


def test_without_the_variable_everything_is_visible():
    assert visible_entries() is None


@pytest.mark.parametrize("told", ["eight_gpus", "nobody_tells"])
def test_ranks_on_gpus_of_their_own_do_not_wait_for_each_other(told, request, monkeypatch):
    request.getfixturevalue(told)
    monkeypatch.setenv("LOCAL_RANK", "0")
    claim_local_device()
    with device_lock("cuda", pytest.fail):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        claim_local_device()
        with device_lock("cuda", pytest.fail):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("told", ["eight_gpus", "nobody_tells"])
def test_whoever_tunes_on_the_same_gpu_waits_however_he_names_it(told, request, monkeypatch):
    request.getfixturevalue(told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    first, second = local_slots("cuda", (0, 1))
    with device_lock(second.lock, pytest.fail):
        with device_lock("cuda", pytest.fail), pytest.raises(Waits), device_lock(first.lock, raise_waits):
            pass
        with pytest.raises(Waits), device_lock("cuda:1", raise_waits):
            pass
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        for name in ("cuda", "cuda:0"):
            with pytest.raises(Waits, match=f"measuring on {name}"), device_lock(name, raise_waits):
                pass


def test_a_slot_has_the_entry_that_its_index_stands_for(nobody_tells, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_slots("cuda") == (Slot("cuda:0", "cuda", "4", "GPU-4"), Slot("cuda:1", "cuda", "6", "GPU-6"))
