"""One rank of the job in test_agree.py: plays every scenario in turn and writes down what it decided.

Usage: agreeing_rank.py FOLDER RANK RANKS. A scenario's stores lie in FOLDER/<scenario>/<rank>, what was shipped with
the package in FOLDER/<scenario>/<rank>/shipped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from isokern.cache import CandidateRecord, Choice, Entry, Layer, Plan, Store
from isokern.cache.environment import Environment
from isokern.registry import Accepted, Backend, Config, DisagreementError, Registry
from isokern.registry.agreement import agree

KEYS = (1, 2, 3)
SHIPPED_KEYS = (2, 7, 9)
SCENARIOS = (
    "equal",
    "one_chose_otherwise",
    "one_is_corrupt",
    "one_has_none",
    "nobody_has_any",
    "one_raises",
    "one_pins_what_others_stored",
    "one_forces_a_backend",
    "all_share_a_damaged_store",
    "equal_tables_alone",
    "equal_tables_and_stores",
    "one_ships_others",
    "equal_tables_and_one_chose_otherwise",
)


def toy():
    """The toy op of the registry's own tests."""
    path = Path(__file__).with_name("test_registry.py")
    spec = importlib.util.spec_from_file_location("registry_toy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["registry_toy"] = module
    spec.loader.exec_module(module)
    return module


TOY = toy()


class Plain(Backend):
    op, name, provenance, priority = "toy", "slow", "python", 0

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        return lambda n: (self.name, n)


class Quick(Plain):
    name, priority = "quick", 50

    def configs(self, problem):
        return (Config.of(tile=4), Config.of(tile=8))


class Flaky(Quick):
    """A backend on a file system that fails once."""

    failures = 1

    def sources(self):
        if self.failures:
            self.failures -= 1
            raise PermissionError(13, "Permission denied", "kernel.cu")
        return super().sources()


def registry_at(root: Path, quick=Quick) -> Registry:
    registry = Registry(builtin_ops={}, load_plugins=False)
    registry.register_op(TOY.toy_spec())
    registry.register_backend(Plain())
    registry.register_backend(quick())
    layers = [Layer("user", root, writable=True)]
    if (root / "shipped").exists():
        layers.append(Layer("shipped", root / "shipped"))
    registry.use_store(Store(layers))
    return registry


def choose(root: Path, tile: int, keys=KEYS) -> None:
    """Fill a store: ``quick[tile]`` for every key, where the heuristic order would take tile 4."""
    registry = registry_at(root)
    fill(Store([Layer("user", root, writable=True)]), registry, registry.environment("cpu"), tile, keys)


def ship(root: Path, tile: int, keys=SHIPPED_KEYS) -> None:
    """The same as a shipped table, made on this silicon with another torch."""
    registry = registry_at(root)
    there = dataclasses.replace(registry.environment("cpu"), versions=(("torch", "2.7.0"),))
    fill(Store([Layer("shipped", root / "shipped", writable=True)]), registry, there, tile, keys)


def fill(store: Store, registry: Registry, environment: Environment, tile: int, keys) -> None:
    source = registry.source_fingerprints("toy")["quick"]
    for n in keys:
        config = {"tile": tile}
        entry = Entry(
            op="toy",
            contract_version=1,
            key={"n": n},
            backend="quick",
            config=config,
            margin_over_runner_up=None,
            margin_over_default=None,
            rule="planted",
            candidates=(
                CandidateRecord(
                    "quick", config, "ok", fingerprint=registry.fingerprint("toy", "quick"), source=source
                ),
            ),
            measured={
                "policy": "eager",
                "method": "none",
                "launches": 0,
                "seconds": 0.0,
                "created": "2026-01-01T00:00:00+00:00",
                "isokern": "0",
            },
            environment=environment.hash,
        )  # fmt: skip
        store.put(entry, environment)


def play(scenario: str, root: Path, rank: int) -> dict:
    quick = Flaky if (scenario, rank) == ("one_raises", 0) else Quick
    registry = registry_at(root, quick)
    if (scenario, rank) == ("one_pins_what_others_stored", 2):
        prints = registry.fingerprint("toy", "quick")
        choices = tuple(Choice("toy", 1, {"n": n}, "quick", {"tile": 8}, prints) for n in KEYS)
        registry.pin(Plan(registry.environment("cpu"), choices))
    if (scenario, rank) == ("one_forces_a_backend", 3):
        registry._environment_overrides = {"toy": "slow"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file's own warning
            agreement = agree(registry, device="cpu")
    except DisagreementError as error:
        return {"raised": str(error)}
    decision = registry.dispatcher("toy").decide(TOY.Size(2))
    missed = registry.dispatcher("toy").decide(TOY.Size(7))
    choose(root, 4)  # tuned by somebody else meanwhile
    if (root / "shipped").exists():
        ship(root, 4, (*SHIPPED_KEYS, 11))  # and another version installed
    registry.refresh()
    later_missed = [registry.dispatcher("toy").decide(TOY.Size(n)) for n in (9, 11)]  # asked for the first time
    later = registry.dispatcher("toy").decide(TOY.Size(2))
    return {
        "ok": agreement.ok,
        "tables": agreement.tables,
        "later_missed": [[found.rule.value, found.config] for found in later_missed],
        "hash": agreement.content_hash,
        "reason": agreement.reason,
        "standings": [state.standing.value for state in agreement.ranks],
        "chose": [decision.backend, decision.config, decision.rule.value, decision.detail, list(decision.notes)],
        "missed": [missed.backend, missed.rule.value, list(missed.notes), missed.config],
        "later": [later.backend, later.config],
        "again": agree(registry, device="cpu").ok,
    }


def main(folder: Path, rank: int, ranks: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    seen = {scenario: play(scenario, folder / scenario / str(rank), rank) for scenario in SCENARIOS}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
