"""What a worker holds and does: problems, bound candidates, and the requests upon them. Runs in the worker only."""

from __future__ import annotations

import importlib
import math
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

from ..errors import IsokernError
from ..registry.accuracy import DEFAULT
from ..registry.backend import Backend, Config, Runner
from ..registry.conformance.kept import Kept
from ..registry.core import Registry
from ..registry.decision import RejectCode
from ..registry.spec import OpSpec
from .measure import Bandwidth, Bench, once
from .measure_cuda import CudaBandwidth, CudaBench
from .measure_cuda import once as once_on_gpu
from .policy import MeasurePolicy
from .recipe import Origin, ProblemRecipe, find_backend
from .threads import WithThreads, torch_threads

__all__ = ["CandidateError", "OwnFault", "Session"]

#: Tokens times value heads that a GPU's reference computes per run: memory is its limit, not time.
_GPU_TOKEN_HEADS = 1 << 18
_NICE = 10
#: What waiting for the device adds to a call at most, and how many times the best one's time is beyond hope: timing a
#: kernel that takes milliseconds as often as one of microseconds would take longer than all the others.
_WAIT_S = 500e-6
_HOPELESS_RATIO = 8.0
#: Share of the free memory that the gate may keep calls and references in.
_KEPT_SHARE = 0.2
#: Seconds that the first calls of a candidate may take, after the first one.
_PATIENCE_S = 0.3


class CandidateError(IsokernError, RuntimeError):
    """A failure of a candidate whose code the session knows. Attribute: ``reject_code``."""

    def __init__(self, code: RejectCode, reason: str) -> None:
        self.reject_code = code
        super().__init__(reason)


class OwnFault(IsokernError, RuntimeError):
    """A failure that is no candidate's. Attribute: ``own_fault``."""

    own_fault = True


@dataclass(frozen=True, slots=True)
class _Bound:
    backend: Backend
    config: Config
    runner: Runner


class Session:
    """One worker's state.

    Args:
        device: ``cpu`` or a CUDA device. threads: torch's intra-op threads.
        registry: where candidates are found; a fresh one if None.
    """

    def __init__(self, device: str, threads: int, registry: Registry | None = None) -> None:
        if device == "cuda":
            device = "cuda:0"  # torch's functions about devices want to know which
        self.device = device
        if device == "cpu":
            torch.set_num_threads(threads)
            _limit_memory()
        else:
            torch.cuda.set_device(device)
            _limit_device_memory(device)
        if registry is None:
            from .. import registry as package

            registry = package.default  # the one that a third party's decorator registers with
        self.registry = registry
        self._kept = Kept(0)
        self._kept_of: dict[str, Kept] = {}  # by what a problem's values depend on; the latest last
        self._recipe: ProblemRecipe | None = None
        self._problem: Any = None
        self._bound: dict[str, _Bound] = {}
        self._bench: Bench | CudaBench | None = None
        self._inputs: Any = None
        self._bandwidth = Bandwidth()
        self._device_bandwidth = CudaBandwidth()
        self._once = once if device == "cpu" else once_on_gpu

    def canary(self) -> int:
        """A small known computation: tells a usable device from one that a dead process left broken."""
        x = torch.arange(64, dtype=torch.float32, device=self.device)
        return int((torch.ones(64, 64, device=self.device) @ x).sum().item())

    def perform(self, name: str, arguments: Mapping[str, Any], at: Callable[[str], None]) -> dict[str, Any]:
        """Do one request; ``at`` announces the candidate about to run, where a request names several."""
        match name:
            case "load":
                return self.load(ProblemRecipe.from_dict(arguments["problem"]))
            case "bind":
                return self.bind(arguments)
            case "import":
                return self.import_modules(arguments["modules"])
            case "rehearse":
                return self.rehearse(ProblemRecipe.from_dict(arguments["problem"]))
            case "compile":
                return self.compile(arguments)
            case "first_call":
                policy = MeasurePolicy(**arguments["policy"])
                best_s = arguments.get("best_s") or math.inf
                return self.first_call(arguments["name"], arguments["calls"], policy, best_s)
            case "gate":
                return self.gate(arguments["name"], arguments["seeds"], arguments["max_token_heads"])
            case "bench":
                self._inputs = None  # this worker makes no first calls
                return self.make_bench(MeasurePolicy(**arguments["policy"]))
            case "time_block":
                return self.bench().block(arguments["names"], self._runners(), at)
            case "floor":
                return self.bench().floor()
            case "unload":
                self._forget()
                return {}
            case "prove":
                from .prove import demonstrate

                return demonstrate(self.registry, arguments)
        raise ValueError(f"request: {name!r} is none that a worker knows")

    # ---- problems

    def _forget(self) -> None:
        if self.device == "cpu":  # where each problem comes once
            self._kept_of.clear()
        self._kept = Kept(0)
        self._recipe = self._problem = self._bench = self._inputs = None
        self._bound.clear()

    @property
    def recipe(self) -> ProblemRecipe:
        if self._recipe is None:
            raise ValueError("no problem is loaded")
        return self._recipe

    @property
    def spec(self) -> OpSpec:
        return self.registry.spec(self.recipe.op)

    def load(self, recipe: ProblemRecipe) -> dict[str, Any]:
        """Make the problem's inputs once, for all candidates; returns the problem's key, for comparison."""
        self._forget()
        self._recipe = recipe
        self._kept = self._keep(recipe)
        self._inputs = self.spec.make_inputs(recipe.case, recipe.seed, self.device)
        problem = self.spec.problem(self._call(self._inputs), recipe.mode)
        self._problem = problem if recipe.accuracy == DEFAULT else problem.with_accuracy(recipe.accuracy)
        return {"key": self._problem.key()}

    def _keep(self, recipe: ProblemRecipe) -> Kept:
        """What is kept of earlier problems with the same values: on a GPU each comes once per launch mode.

        Of the memory that is free, problems keep a share; the oldest are given up for one that is new.
        """
        values = recipe.values
        found = self._kept_of.pop(values, None)
        if found is None:
            most = int(_KEPT_SHARE * _free_bytes(self.device))
            while (held := sum(kept.bytes for kept in self._kept_of.values())) > most // 2:
                del self._kept_of[next(iter(self._kept_of))]
            found = Kept(most - held)
        self._kept_of[values] = found
        return found

    def _call(self, inputs: Any) -> Any:
        return self.spec.canonical(**inputs.kwargs)

    # ---- candidates

    def bind(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """Import, if need be, and bind one candidate; returns its backend's fingerprint as this process sees it."""
        where = candidate["origin"]
        origin = None if where is None else Origin(**where)
        op, name = self.recipe.op, candidate["backend"]
        config = Config.from_dict(candidate["config"])
        try:
            backend = find_backend(self.registry, op, name, origin)
            runner = backend.bind(self._problem, config)
        except MemoryError:
            raise
        except Exception as error:
            raise CandidateError(RejectCode.COMPILE, f"{type(error).__name__}: {error}") from error
        self._bound[candidate["name"]] = _Bound(backend, config, runner)
        # Once per process: what was imported counts, not what has become of the files since.
        return {"fingerprint": self.registry.fingerprint(op, name)}

    def import_modules(self, names: list[str]) -> dict[str, Any]:
        """Import ahead what candidates will; of what fails, the reason (the candidate's own import fails again)."""
        failed = {}
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - another library's import may raise anything
                failed[name] = f"{type(error).__name__}: {error}"
        return {"failed": failed}

    def rehearse(self, recipe: ProblemRecipe) -> dict[str, Any]:
        """Gate the reference itself, whatever comes of it: libraries load their kernels at first use, for seconds."""
        self.load(recipe)
        reference: dict[str, Any] = {"name": "", "backend": self.spec.reference_backend, "config": {}, "origin": None}
        self.bind(reference)
        return self.gate("", [recipe.seed], 1)

    def compile(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Compile one candidate's kernels for some problems on a GPU of architecture ``arch``; needs no GPU."""
        config = Config.from_dict(arguments["config"])
        where = arguments["origin"]
        _yield_processors()
        for record in arguments["problems"]:
            recipe = ProblemRecipe.from_dict(record)
            problem = importlib.import_module(recipe.hooks).describe(recipe.case, "cuda", arguments["arch"])
            backend = find_backend(
                self.registry, recipe.op, arguments["backend"], None if where is None else Origin(**where)
            )
            backend.compile(problem, config)
        return {}

    def first_call(self, name: str, calls: int, policy: MeasurePolicy, best_s: float = math.inf) -> dict[str, Any]:
        """Seconds of first calls, on a copy of the inputs: ``calls`` short ones, or two (the first may compile).

        On a GPU then as ``policy`` times them, since a call that is waited for takes the host longer than most kernels;
        unless it takes so long that it is hopeless beside one of ``best_s``. Where that is in graphs, also ``least_s``:
        what one call after another, launched eagerly, takes at least.
        """
        runner = self._bound[name].runner
        call = self._call(self._inputs.clone())
        seconds = [self._once(self.spec, call, runner)]
        if self.device == "cpu":
            while len(seconds) < 2 or (len(seconds) < calls and sum(seconds[1:]) < _PATIENCE_S):
                seconds.append(self._once(self.spec, call, runner))
            return {"seconds": seconds}
        waited = self._once(self.spec, call, runner)
        in_graphs, hopeless = policy.mode == "graph", _HOPELESS_RATIO * best_s + _WAIT_S
        if waited > hopeless:  # twice: the host may have been at something else, such as compiling
            waited = min(waited, self._once(self.spec, call, runner))
        if waited > hopeless:
            # Host and device each took part of it, and of the next call one may do its part meanwhile.
            return {"seconds": [waited], "least_s": (waited - _WAIT_S) / 2 if in_graphs else None}
        if self._bench is None:
            self.make_bench(policy)
        bench = self.bench()
        assert isinstance(bench, CudaBench)
        glance = bench.glance(name, runner, waited)
        bench.forget(name)
        return {"seconds": [glance], "least_s": glance if in_graphs and bench.rotates else None}

    def gate(self, name: str, seeds: list[int], max_token_heads: int) -> dict[str, Any]:
        """Judge one bound candidate; see ``registry.conformance.gate``."""
        from ..registry.conformance.gate import gate

        bound = self._bound[name]
        backend = bound.backend
        threads = torch.get_num_threads()
        with torch_threads(1), _PeakMemory() if self.device == "cpu" else _PeakDeviceMemory(self.device) as peak:
            try:
                result = gate(
                    self.recipe.op,
                    WithThreads(backend, threads) if self.device == "cpu" else backend,
                    bound.config,
                    self.recipe.case,
                    seeds=tuple(seeds),
                    adversarial=self.recipe.twin,
                    max_token_heads=max_token_heads if self.device == "cpu" else _GPU_TOKEN_HEADS,
                    device=self.device,
                    kept=self._kept,
                )
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # what the backend does wrong is in the result; this is the gate's own fault
                raise OwnFault(f"the gate itself failed: {type(error).__name__}: {error}") from error
        return {
            "code": None if result.code is None else result.code.value,
            "reason": result.reason,
            "repeatable": bool(result.repeatable),
            "peak_bytes": peak.bytes,
        }

    # ---- timing

    def make_bench(self, policy: MeasurePolicy) -> dict[str, Any]:
        """Prepare rotated calls for timing the loaded problem."""
        if self.device == "cpu":
            self._bench = Bench(self.spec, self.recipe, self.device, policy, self._bandwidth)
        else:
            self._bench = CudaBench(self.spec, self.recipe, self.device, policy, self._device_bandwidth)
        return self._bench.facts()

    def bench(self) -> Bench | CudaBench:
        if self._bench is None:
            raise ValueError("no bench is prepared")
        return self._bench

    def _runners(self) -> dict[str, Runner]:
        return {name: bound.runner for name, bound in self._bound.items()}


@cache
def _yield_processors() -> None:
    """Processes that compile let those go first that measure."""
    os.nice(_NICE)


def _free_bytes(device: str) -> int:
    return int(psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0])


def _limit_memory() -> None:
    """Make a greedy candidate fail with MemoryError, instead of the machine's memory running out."""
    try:
        here = psutil.Process().memory_info().vms
        limit = here + psutil.virtual_memory().available
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (OSError, ValueError):
        return  # a platform without this limit


#: Share of a GPU's free memory that one worker may take: another one, and the program that tunes, share the device.
_DEVICE_SHARE = 0.6


def _limit_device_memory(device: str) -> None:
    """Make a greedy candidate fail with OutOfMemoryError, instead of starving the worker that times."""
    free, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(_DEVICE_SHARE * free / total, device)


class _PeakDeviceMemory:
    """Peak bytes that torch held on a GPU within a block, beyond those at its start."""

    bytes: int | None = None

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> _PeakDeviceMemory:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exc: object) -> None:
        if not isinstance(exc[1], Exception):  # after a sticky error the device says nothing any more
            self.bytes = max(0, torch.cuda.max_memory_allocated(self._device) - self._start)


class _PeakMemory:
    """Peak resident bytes within a block, beyond those at its start; None where the kernel does not tell."""

    bytes: int | None = None

    def __enter__(self) -> _PeakMemory:
        self._start: int | None = None
        try:
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")  # resets the high-water mark
            self._start = _high_water_mark()
        except OSError:
            pass
        return self

    def __exit__(self, *exc: object) -> None:
        if self._start is not None:
            self.bytes = max(0, _high_water_mark() - self._start)


def _high_water_mark() -> int:
    with open(f"/proc/{os.getpid()}/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc")
