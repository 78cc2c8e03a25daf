"""Many writers, one directory, no locks: nothing is lost, and a killed writer leaves nothing half written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from isokern.cache.audit import check_layer
from isokern.cache.layer import Layer
from isokern.cache.store import Store

#: A writer: ``python -c WRITER root first count samples``. Puts ``count`` entries of its own, numbered from
#: ``first``, each followed by one of a key that all writers share; says ``ready`` after the first.
WRITER = """
import sys
from pathlib import Path
from isokern.cache import CandidateRecord, Entry, Layer, Store
from isokern.cache.environment import Environment
from isokern.cache.silicon import CpuSilicon

root, first, count, samples = Path(sys.argv[1]), *map(int, sys.argv[2:])
here = Environment("cpu", CpuSilicon("x86_64", 8, ()), 8, "", (), "3.11")
measured = dict(policy="eager", method="", launches=1, seconds=1, created="2025-11-02", isokern="0")
store = Store([Layer("user", root, writable=True)])
for number in range(first, first + count):
    for n in (number, -1):
        won = CandidateRecord("b", {}, "ok", None, None, float(number), (float(number),) * samples, "f")
        entry = Entry("some_op", 1, {"n": n}, "b", {}, None, None, "", (won,), measured, here.hash)
        assert store.put(entry, here)
    if number == first:
        print("ready", flush=True)
"""


def start(root: Path, first: int, count: int, samples: int, code: str = WRITER) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-c", code, str(root), str(first), str(count), str(samples)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def assert_all_valid(root: Path) -> None:
    checked = list(check_layer(Layer("user", root)))
    assert checked
    assert [found for found in checked if found.problem] == []


def test_eight_writers_lose_nothing(tmp_path):
    writers = [start(tmp_path, 50 * number, 50, 5) for number in range(8)]
    assert [writer.wait(60) for writer in writers] == [0] * 8
    for writer in writers:
        writer.stdout.close()
    assert_all_valid(tmp_path)
    store = Store([Layer("user", tmp_path)])
    assert sorted(found.entry.key["n"] for found in store.entries()) == [-1, *range(400)]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_readers_of_an_entry_being_replaced_see_a_whole_one(tmp_path):
    writers = [start(tmp_path, 1000 * number, 1000, 3000) for number in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    store = Store([Layer("user", tmp_path)])
    (shared,) = [found for found in store.entries() if found.entry.key["n"] == -1]
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            entry = shared.layer.read_path(shared.path)
            assert entry is not None
            assert set(entry.chosen.samples_us) == {entry.chosen.median_us}
            seen.add(entry.chosen.median_us)
    for writer in writers:
        writer.kill()
        writer.wait(30)
        writer.stdout.close()
    assert len(seen) > 1, "the entry was not replaced while it was read"


#: Writes the entry files of ``n = first .. first + 4`` over and over, as fast as it can: the texts are made before,
#: and fsync, which matters when the power fails and not when a process dies, is left out.
HASTY_WRITER = (
    WRITER.split("store =", maxsplit=1)[0]
    + """
import itertools, os
from isokern.cache.files import write_atomic
os.fsync = lambda descriptor: None
layer = Layer("user", root, writable=True)
files = []
for n in range(first, first + count):
    won = CandidateRecord("b", {}, "ok", None, None, 1.0, (1.0,) * samples, "f")
    entry = Entry("some_op", 1, {"n": n}, "b", {}, None, None, "", (won,), measured, here.hash)
    files.append((layer.write(entry, here), entry.to_json()))
print("ready", flush=True)
for file in itertools.cycle(files):
    write_atomic(*file)
"""
)


def test_writers_killed_mid_flight_leave_only_whole_entries(tmp_path):
    writers = [start(tmp_path, 4 * number, 4, 30_000, HASTY_WRITER) for number in range(6)]
    for number, writer in enumerate(writers):
        assert writer.stdout.readline() == "ready\n"
        time.sleep(0.037 * number)  # so that they die in different places of a write
        writer.send_signal(signal.SIGKILL)
    for writer in writers:
        assert writer.wait(30) == -signal.SIGKILL
        writer.stdout.close()
    assert_all_valid(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = [found.entry for found in Store([Layer("user", tmp_path)]).entries()]
    assert sorted(entry.key["n"] for entry in entries) == list(range(24))


@pytest.mark.parametrize("stop_in", ["fsync", "replace"])
def test_a_writer_killed_before_the_rename_leaves_the_old_entry(tmp_path, stop_in):
    old = start(tmp_path, 1, 1, 3)
    assert old.wait(30) == 0
    old.stdout.close()
    freeze = f"import os, time\nos.{stop_in} = lambda *_: (print('frozen', flush=True), time.sleep(60))\n"
    writer = start(tmp_path, 1, 1, 99, freeze + WRITER)
    assert writer.stdout.readline() == "frozen\n"
    writer.kill()
    writer.wait(30)
    writer.stdout.close()
    assert_all_valid(tmp_path)
    found = [located.entry for located in Store([Layer("user", tmp_path)]).entries()]
    assert [len(entry.chosen.samples_us) for entry in found] == [3, 3]
    (left,) = Layer("user", tmp_path).temporaries()
    assert left.name.startswith(".")
