"""One rank of the job in test_agree.py: plays every scenario in turn and writes down what it decided.

Usage: agreeing_rank.py FOLDER RANK RANKS. A scenario's stores lie in FOLDER/<scenario>/<rank>.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from isokern.cache import CandidateRecord, Choice, Entry, Layer, Plan, Store
from isokern.registry import Accepted, Backend, Config, DisagreementError, Registry
from isokern.registry.agreement import agree

KEYS = (1, 2, 3)
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
    registry.use_store(Store([Layer("user", root, writable=True)]))
    return registry


def choose(root: Path, tile: int, keys=KEYS) -> None:
    """Fill a store: ``quick[tile]`` for every key, where the heuristic order would take tile 4."""
    registry = registry_at(root)
    environment = registry.environment("cpu")
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
                CandidateRecord("quick", config, "ok", fingerprint=registry.fingerprint("toy", "quick")),
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
        registry.store.put(entry, environment)


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
    registry.refresh()
    later = registry.dispatcher("toy").decide(TOY.Size(2))
    return {
        "ok": agreement.ok,
        "hash": agreement.content_hash,
        "reason": agreement.reason,
        "standings": [state.standing.value for state in agreement.ranks],
        "chose": [decision.backend, decision.config, decision.rule.value, decision.detail, list(decision.notes)],
        "missed": [missed.backend, missed.rule.value, list(missed.notes)],
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
