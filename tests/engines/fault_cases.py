"""Runs the faults of ``planted_faults`` for one backend: ``python fault_cases.py BACKEND [FAULT ...]`` prints JSON.

Not a test module. Each fault gets a copy of the backend's folder that stands in for the backend, in a forked process of
its own: an engine is loaded once per process, and a kernel that runs wild may take its process along.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

import torch

import isokern
from isokern.engines import ENGINES, load_engine

sys.path.insert(0, str(Path(__file__).parent))
from planted_faults import FAULTS

torch.set_num_threads(1)  # and so none to lose in a fork


def plant(backend, file, good, bad):
    """Put a changed copy of the backend's folder in the backend's place. Before anything of it is imported."""
    name = ENGINES[backend].implementation.rpartition(".backend:")[0]
    source = Path(isokern.__file__).parent / Path(*name.split(".")[1:])
    folder = Path(tempfile.mkdtemp()) / source.name
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if file:
        text = (folder / file).read_text()
        assert good in text, "the planted fault no longer applies: plant another"
        (folder / file).write_text(text.replace(good, bad))
    assert name not in sys.modules
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return folder.parent


def examine(name, fault):
    """Empty if the fault is found as it should be; run in a forked child."""
    file, good, bad, *how = fault
    scratch = plant(name, file, good, bad)
    try:
        backend, engine = load_engine(name)  # first: torch's compiler, which checks use, imports Triton
        from fault_means import showing

        return "" if all(showing(backend, engine, *how)) else f"not found by {how[0]}"
    finally:
        shutil.rmtree(scratch)


def without_a_fault(name):
    """Empty if a copy without a fault shows nothing by any means in any case."""
    scratch = plant(name, "", "", "")
    try:
        backend, engine = load_engine(name)
        from fault_means import showing

        shown = sorted({tuple(how) for _, _, _, *how in FAULTS[name].values()})
        wrong = [
            f"{how[0]} shows a fault in {how[1]!r} where there is none; "
            for how in shown
            if any(showing(backend, engine, *how))
        ]
        return "".join(wrong)
    finally:
        shutil.rmtree(scratch)


def in_a_child(function, *args):
    """What the function returns, or how its process died."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            text = function(*args)
        except BaseException:  # noqa: BLE001  (whatever it is goes to the parent)
            text = traceback.format_exc()
        os.write(write, text.encode()[-60000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else text


def main():
    name = sys.argv[1]
    wanted = sys.argv[2:]
    results = {}
    if ENGINES[name].name == "cuda_on_cpu":  # once for all faults; others load their engine first
        importlib.import_module("fault_means")
    if not wanted:
        results["without a fault"] = in_a_child(without_a_fault, name)
    for fault, how in FAULTS[name].items():
        if not wanted or fault in wanted:
            results[fault] = in_a_child(examine, name, how)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
