"""What this machine and installation can do, as data; ``isokern doctor`` prints it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .accuracy import ACCURACIES
from .core import Registry
from .overrides import ACCURACY_PREFIX, ENVIRONMENT_PREFIX, environment_accuracies, environment_overrides
from .plugins import BrokenBackend, missing_modules

if TYPE_CHECKING:
    from ..cache.layer import Layer

__all__ = ["Item", "examine"]

_PACKAGES = ("torch", "numpy", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "numba-cuda", "ray")


@dataclass(frozen=True, slots=True)
class Item:
    """One finding: ``bad`` means something the user asked for does not work; ``absent`` is merely not there."""

    topic: str
    name: str
    state: Literal["ok", "absent", "bad"]
    text: str


def examine(registry: Registry) -> list[Item]:
    """Look at packages, devices, backends, overrides and the store. Initialises no CUDA context."""
    return [*_packages(), *_devices(), *_backends(registry), *_overrides(registry), *_store(registry)]


def _packages() -> list[Item]:
    items = [Item("package", "python", "ok", platform.python_version())]
    for name in _PACKAGES:
        try:
            items.append(Item("package", name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            items.append(Item("package", name, "absent", "not installed"))
    return items


def _devices() -> list[Item]:
    import torch

    items = [Item("device", "cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    count = torch.cuda.device_count()  # asks the driver, creates no context
    if count:
        items.append(Item("device", "cuda", "ok", f"{count} devices"))
    else:
        items.append(Item("device", "cuda", "absent", "no device, or torch was built without CUDA"))
    return items


def _backends(registry: Registry) -> list[Item]:
    items = []
    for op in registry.names():
        for name, backend in registry.backends(op).items():
            topic = f"backend of {op}"
            missing = missing_modules(backend)
            if isinstance(backend, BrokenBackend):
                items.append(Item(topic, name, "bad", f"plugin failed to load: {backend.error}"))
            elif missing:
                items.append(Item(topic, name, "absent", f"needs {', '.join(missing)}"))
            else:
                tags = ", ".join(sorted(backend.tags))
                items.append(Item(topic, name, "ok", f"{backend.provenance}; {tags}"))
    return items


def _overrides(registry: Registry) -> list[Item]:
    items = []
    for op, name in environment_overrides().items():
        variable = f"{ENVIRONMENT_PREFIX}{op.upper()}"
        if op not in registry.names():
            items.append(Item("override", variable, "bad", f"no op {op!r} is registered"))
        elif name not in registry.backends(op):
            items.append(Item("override", variable, "bad", f"op {op!r} has no backend {name!r}"))
        else:
            items.append(Item("override", variable, "ok", f"{op} always runs on {name}"))
    for op, policy in environment_accuracies().items():
        variable = f"{ACCURACY_PREFIX}{op.upper()}"
        if op not in registry.names():
            items.append(Item("override", variable, "bad", f"no op {op!r} is registered"))
        elif policy not in ACCURACIES:
            items.append(Item("override", variable, "bad", f"{policy!r} is none of {', '.join(ACCURACIES)}"))
        else:
            items.append(Item("override", variable, "ok", f"{op} is chosen under accuracy={policy!r}"))
    return items


def _store(registry: Registry) -> list[Item]:
    items = []
    for layer in registry.store.layers:
        there = layer.root.exists()
        if not layer.writable:
            text = f"{layer.root}{'' if there else ' (none)'}, read only{_tables(layer)}"
            items.append(Item("store", layer.name, "ok" if there else "absent", text))
            continue
        probe = layer.root
        while not probe.exists() and probe != probe.parent:
            probe = probe.parent
        able = os.access(probe, os.W_OK) and probe.is_dir()
        text = str(layer.root) if able else f"{layer.root} cannot be written: choices last as long as the process"
        items.append(Item("store", layer.name, "ok" if able else "bad", text))
    return items


def _tables(layer: Layer) -> str:
    """What a layer of shipped tables has, and of which devices; their entries are counted, not read."""
    from ..cache.codec import InvalidRecordError
    from ..cache.shipped import SHIPPED

    if layer.name != SHIPPED:
        return ""
    try:
        return "".join(f"; {_table(layer, name)}" for name in layer.environments())
    except (InvalidRecordError, OSError) as error:
        return f"; cannot be read: {error}"


def _table(layer: Layer, name: str) -> str:
    made_in = layer.read_environment(name)
    device = f"{name}, without a manifest" if made_in is None else made_in.describe()
    return f"{device}: {sum(1 for _ in layer.entry_paths(name))} entries"
