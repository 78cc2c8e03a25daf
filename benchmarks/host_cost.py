"""Host microseconds of one call, and of its parts: recognising it, its output, packing, the driver.

    python benchmarks/host_cost.py [--backend triton ...] [--no-mixed] [--sglang FOLDER] [--save | --out FILE]

Decode steps at HV = 32, and a mixed batch taken apart by ``composite`` beside what its kernels cost alone, called as an
engine's code calls: tensors by position, what is not the default by name; the torch operator as compiled graphs call
it. Every implementation in turn, in random order, a hundred calls at a time, so that the device's queue is never full;
the device is waited for outside the timed region. Medians over rounds, the garbage collector off. Without a GPU the
launchers run up to the driver, on tensors of the CPU: what is packed is timed, nothing is launched.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from framework_launches import OWN_LAUNCHES
from host_mixed import MIXED, mixed_ops
from record import Row, meta, save
from rich.console import Console
from rich.table import Table

from isokern import registry
from isokern.backends.launch.driver import Driver, address_of, gpu
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.registry import FunctionBackend, Registry
from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.entry import Entry
from isokern.registry.ops.fused_sigmoid_gating.guards import is_current_stream_capturing
from isokern.registry.ops.fused_sigmoid_gating.op import FusedSigmoidGating
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.torch_settings import Settings, settings_of

OP = "fused_sigmoid_gating"
BACKENDS = ("triton", "cupy", "numba_cuda")
BATCHES = (1, 4, 64)
#: Sequences at which the frameworks' own launches are timed: they cost the same for any number, and compile anew.
OWN_AT = 4
CALLS, ROUNDS = 100, 25
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
#: Tokens more than in the mixed batch, in batches of its profile that are each met anew.
OTHER_SIZES = range(1, 33)
#: A C function of any arguments that does nothing and returns 0 (``FE_TONEAREST``): a launch without its launch.
NOTHING = "fegetround"

Run = Callable[[], object]


@dataclass
class Timed:
    """What to time. ``part``: a piece of a call, not a whole one."""

    implementation: str
    run: Run
    backend: str | None = None
    config: str | None = None
    part: bool = False
    samples: list[float] = field(default_factory=list)


def spec_of(n: int) -> CaseSpec:
    # On a CPU a bare tensor of offsets is read in every call; on a GPU it never is.
    name = f"decode N={n} H=16 HV=32 float32"
    return CaseSpec(name, (1,) * n, h=16, hv=32, k=128, v=128, state_layout="vk", as_layout=not ON_GPU)


def site_of(op: Callable[..., object], kwargs: dict, backend: str | None, out: torch.Tensor | None = None) -> Run:
    """A call of the op, written out."""
    A_log, a, dt_bias, q, k, v, b = (kwargs[name] for name in ("A_log", "a", "dt_bias", "q", "k", "v", "b"))
    beta, threshold, scale = kwargs["softplus_beta"], kwargs["softplus_threshold"], kwargs["scale"]
    pool, slots, l2norm = (
        kwargs[name] for name in ("initial_state_source", "initial_state_indices", "use_qk_l2norm_in_kernel")
    )
    cu, layout = kwargs["cu_seqlens"], kwargs["state_layout"]
    if out is None:
        return lambda: op(
            A_log, a, dt_bias, beta, threshold, q, k, v, b, pool, slots, scale, l2norm, cu,
            state_layout=layout, backend=backend,
        )  # fmt: skip
    return lambda: op(
        A_log, a, dt_bias, beta, threshold, q, k, v, b, pool, slots, scale, l2norm, cu,
        state_layout=layout, backend=backend, out=out,
    )  # fmt: skip


def operator_site_of(kwargs: dict, backend: str | None) -> Run:
    """A call of the torch operator as a compiled graph makes it: the overload, by position."""
    operator = torch.ops.isokern.fused_sigmoid_gating_step.default
    names = "A_log a dt_bias q k v b initial_state_source initial_state_indices".split()
    cu = kwargs["cu_seqlens"]
    settings = settings_of(*((kwargs | {"backend": backend}).get(name) for name in Settings._fields))
    arguments = (*(kwargs[name] for name in names), getattr(cu, "cu_seqlens", cu), settings)
    return lambda: operator(*arguments)


def call_of(spec: CaseSpec) -> tuple[dict, Call]:
    kwargs = registry.spec(OP).make_inputs(spec, 0, DEVICE).kwargs
    call = registry.spec(OP).canonical(**kwargs)
    call.out = registry.spec(OP).allocate(call)
    return kwargs, call


def without_launch(driver: Driver) -> Driver:
    """The same driver, but launches end before its door."""
    return replace(driver, library=_Unlaunched(driver.library))


def unlaunched_driver() -> Driver:
    """One for tensors of a CPU, whose launches end at once."""
    return replace(RecordingLibrary().driver(), library=_Unlaunched(RecordingLibrary()))


class _Unlaunched:
    def __init__(self, library: object) -> None:
        self._library = library
        self.cuLaunchKernelEx = getattr(ctypes.CDLL("libm.so.6"), NOTHING)

    def __getattr__(self, name: str) -> object:
        return getattr(self._library, name)


def launcher_on(backend: str, call: Call, driver: Driver) -> tuple[Launcher, Config]:
    """The backend's runner with its default config, over ``driver``; on a CPU as if the tensors were on an H100."""
    problem = call.problem("eager")
    if not ON_GPU:
        problem = replace(problem, device="cuda", arch=90)
    implementation = registry.backends(OP)[backend]
    config = implementation.configs(problem)[0]
    return Launcher(backend, problem, config, compiler_of(backend, problem, config), driver), config


def compiler_of(backend: str, problem: object, config: Config) -> object:
    match backend:
        case "triton":
            from isokern.backends.triton.compiling import TritonCompiler

            return TritonCompiler(problem, config)
        case "cupy":
            from isokern.backends.cupy.compiling import CupyCompiler
            from isokern.backends.cupy.specialization import Specialization

            return CupyCompiler(Specialization.of(problem, config), problem.arch)
        case "numba_cuda":
            from isokern.backends.numba_cuda.launch import NumbaCompiler

            return NumbaCompiler.of(problem, config)
    raise typer.BadParameter(f"{backend}: expected one of {', '.join(BACKENDS)}")


def driver_launches(launcher: Launcher, call: Call) -> list[Timed]:
    """The driver call alone, prepared and unchanging, through ctypes and through cuda-bindings."""
    seen: list[tuple[object, object, object]] = []
    library = _Unlaunched(gpu().library)
    library.cuLaunchKernelEx = lambda config, handle, _params, extra: seen.append((config, handle, extra)) or 0
    pinned = Launcher(launcher.backend, launcher.problem, launcher.config, launcher.compiler,
                      replace(gpu(), library=library)).pin(call)  # fmt: skip
    pinned(tensors_of(call))
    config, handle, extra = seen[0]
    launch = gpu().library.cuLaunchKernelEx
    # ``pinned`` owns the memory behind the addresses.
    timed = [Timed("driver launch, ctypes", lambda: (launch(config, handle, None, extra), pinned)[0], part=True)]
    if importlib.util.find_spec("cuda.bindings") is not None:
        from cuda.bindings import driver

        prepared, kernel, rest = driver.CUlaunchConfig(_ptr=address_of(config)), address_of(handle), address_of(extra)
        bound, loaded = driver.cuLaunchKernelEx, driver.CUfunction(kernel)
        timed.append(Timed("driver launch, cuda-bindings", lambda: bound(prepared, loaded, 0, rest), part=True))
    return timed


def tensors_of(call: Call) -> tuple[torch.Tensor | None, ...]:
    return tuple(getattr(call, name) for name in TENSORS)


def recognition(launcher: Launcher, kwargs: dict, call: Call) -> list[Timed]:
    """The whole op in front of a launcher, and what its dispatch is made of."""
    name, out = launcher.backend, call.out
    if out is None:
        raise typer.BadParameter("a call with its output")
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    own.register_backend(FunctionBackend(launcher, OP, name, priority=50))
    timed = []
    if not ON_GPU:
        op, given = own.get(OP), own.dispatcher(OP).spec.make_op(own.dispatcher(OP))
        timed += [
            Timed("isokern op, not launched", _known(site_of(op, kwargs, name), op)),
            Timed("isokern op, out given, not launched", _known(site_of(given, kwargs, name, out), given)),
        ]
    # The same hot path, where all tensors are taken for known and nothing runs: reading and comparing the arguments.
    bare = own.dispatcher(OP).spec.make_op(own.dispatcher(OP))
    site = _known(site_of(bare, kwargs, name, out))
    [entry] = bare.entries.recent
    check, present, tensors = entry.guard, entry.present, tensors_of(call)
    made = _output_of(own, kwargs, name)
    entry.guard, entry.pinned, entry.on_host, entry.on_cuda = _accepts, _runs_nothing, False, False
    timed += [
        Timed("call and argument comparison", site, part=True),
        Timed("guard check", lambda: check(*present(tensors)), part=True),
        Timed("output", lambda: made(out), part=True),
    ]
    if ON_GPU:
        timed.append(Timed("capturing check", is_current_stream_capturing, part=True))
    return timed


def _known(site: Run, op: FusedSigmoidGating | None = None) -> Run:
    """The call of a site, which has been made once; of tensors on a CPU as if they were on a GPU."""
    site()
    for entry in () if op is None else op.entries.recent:
        entry.on_host = False  # their slots would be looked at
    return site


def _accepts(*tensors: object) -> bool:
    return True


def _runs_nothing(tensors: object) -> None:
    return None


def _output_of(own: Registry, kwargs: dict, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes the outputs of such calls."""
    op = own.dispatcher(OP).spec.make_op(own.dispatcher(OP))
    _known(site_of(op, kwargs, name))
    entry: Entry = op.entries.recent[0]
    if entry.new_output is None:
        raise typer.BadParameter("a call that needs no output")
    return entry.new_output


def own_launches(launcher: Launcher, call: Call) -> list[Timed]:
    """The framework's own ways to launch the same kernel; what it cannot do is named and left out."""
    try:
        launches = OWN_LAUNCHES[launcher.backend](launcher.problem, launcher.config, call)
        for run in launches.values():
            run()
    except (*launcher.compiler.errors(), TypeError, AttributeError) as error:
        typer.echo(f"{launcher.backend}'s own launch is left out: {type(error).__name__}: {error}", err=True)
        return []
    return [Timed(name, run) for name, run in launches.items()]


def of_backend(backend: str, spec: CaseSpec) -> list[Timed]:
    """Everything to time of one backend on one case."""
    kwargs, call = call_of(spec)
    driver = gpu() if ON_GPU else unlaunched_driver()
    launcher, config = launcher_on(backend, call, driver)
    unlaunched, _ = launcher_on(backend, call, without_launch(driver))
    tensors = tensors_of(call)
    pinned, packed = launcher.pin(call), unlaunched.pin(call)
    timed = [Timed("pointers and packing", lambda: packed(tensors), part=True), *recognition(launcher, kwargs, call)]
    if ON_GPU:
        op = registry.get(OP)
        timed += [
            Timed("isokern op", site_of(op, kwargs, backend)),
            Timed("isokern op, out given", site_of(op, kwargs, backend, call.out)),
            Timed("isokern op's __call__, kept", site_of(op.__call__, kwargs, backend)),
            Timed("isokern through torch.library", operator_site_of(kwargs, backend)),
            Timed("bound runner", lambda: launcher(call)),
            Timed("pinned runner", lambda: pinned(tensors)),
            *driver_launches(launcher, call),
        ]
        if spec.n == OWN_AT:
            timed += own_launches(launcher, call)
    else:
        timed.append(Timed("bound runner, not launched", lambda: launcher(call)))
    for one in timed:
        one.backend, one.config = backend, config.label
    return timed


def of_mixed() -> list[Timed]:
    """Whole calls of a mixed batch: one that was met before, and one of a number of tokens that was not."""
    kwargs, _ = call_of(MIXED)
    others = [call_of(MIXED.but(lengths=(*MIXED.lengths[:-1], MIXED.lengths[-1] + i)))[0] for i in OTHER_SIZES]
    timed = []
    for (implementation, backend), op in mixed_ops(unlaunched_driver()).items():
        timed.append(Timed(implementation, _known(site_of(op, kwargs, backend), op), backend))
    for (implementation, backend), op in mixed_ops(unlaunched_driver()).items():
        sites = [site_of(op, each, backend) for each in others]
        timed.append(Timed(f"{implementation}, sizes not met before", _not_met_before(op, sites), backend))
    return timed


def _not_met_before(op: FusedSigmoidGating, sites: list[Run]) -> Run:
    """The calls in turn, each as if it was the first of its sizes: decided and compiled, but not remembered."""
    turns = itertools.cycle(sites)

    def run() -> None:
        op.entries.clear()
        next(turns)()

    return run


def common(spec: CaseSpec, sglang: Path | None) -> list[Timed]:
    """What belongs to no backend."""
    _, call = call_of(spec)
    timed = [Timed("torch.empty_like", lambda: torch.empty_like(call.v), part=True)]
    tensors = [t for t in tensors_of(call) if t is not None]
    timed.append(Timed(f"data_ptr() of {len(tensors)} tensors", lambda: [t.data_ptr() for t in tensors], part=True))
    if ON_GPU:
        driver = gpu()
        device = call.q.device.index
        timed.append(Timed("current raw stream", lambda: driver.stream(device), part=True))
        if sglang is not None:
            from isokern.tools.gpu_test.sglang import NAME, load

            update = load(sglang)
            timed.append(Timed(NAME, lambda: update(call)))
    return timed


def measure(timed: list[Timed]) -> None:
    """Fill in the samples, microseconds per call."""
    wait = torch.cuda.synchronize if ON_GPU else lambda: None
    for one in timed:
        for _ in range(3):
            one.run()
    wait()
    shuffle = random.Random(0)
    with _collector_off():
        for _ in range(ROUNDS):
            order = list(timed)
            shuffle.shuffle(order)
            for one in order:
                run, calls = one.run, range(CALLS)
                start = time.perf_counter()
                for _ in calls:
                    run()
                one.samples.append(1e6 * (time.perf_counter() - start) / CALLS)
                wait()


@contextmanager
def _collector_off():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rows_of(spec: CaseSpec, timed: list[Timed]) -> list[Row]:
    rows = []
    for one in timed:
        first, median, third = statistics.quantiles(one.samples, n=4)
        extra = {"part": one.part, "min_us": round(min(one.samples), 2), "spread_us": round(third - first, 2)}
        extra["samples"] = len(one.samples)
        row = Row(spec.name, one.implementation, one.backend, one.config, eager_us=round(median, 2), extra=extra)
        rows.append(row)
    found = {(row.backend, row.implementation): row.eager_us for row in rows}
    for backend in {row.backend for row in rows if row.backend}:
        given, pinned = found.get((backend, "isokern op, out given")), found.get((backend, "pinned runner"))
        if given is not None and pinned is not None:
            extra = {"part": True, "difference": "isokern op, out given - pinned runner"}
            rows.append(Row(spec.name, "dispatch", backend, eager_us=round(given - pinned, 2), extra=extra))
    return rows


def information(commit: str | None) -> dict:
    if not ON_GPU:
        return meta(launches="none: up to the driver, on CPU tensors")
    from isokern.tools.gpu_test.machine import describe_run, find

    model = [
        x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    described = describe_run(find(), commit)
    return described | {"command": " ".join(["python", *sys.argv]), "cpu": model[0] if model else None}


def show(rows: list[Row]) -> None:
    table = Table(title="host microseconds per call, medians")
    cases = list(dict.fromkeys(row.case for row in rows))
    for column in ("backend", "implementation", *cases):
        table.add_column(column, justify="right" if column in cases else "left")
    cell = {(row.backend, row.implementation, row.case): row for row in rows}
    for backend, implementation in dict.fromkeys((row.backend, row.implementation) for row in rows):
        found = (cell.get((backend, implementation, case)) for case in cases)
        table.add_row(backend or "", implementation, *("" if row is None else f"{row.eager_us:.2f}" for row in found))
    Console(width=160).print(table)


def main(
    backend: Annotated[list[str] | None, typer.Option(help="Backends to time; default: all.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; default: 1, 4 and 64.")] = None,
    mixed: Annotated[bool, typer.Option(help="Time a mixed batch as well.")] = True,
    sglang: Annotated[Path | None, typer.Option(help="Folder with the package sglang, to time its op.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    save_as: Annotated[
        str | None, typer.Option("--save", help="Write into benchmarks/results, under this GPU's name.")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="The sources' name in the results; default: what git says.")
    ] = None,
) -> None:
    """Measure, print, save."""
    rows: list[Row] = []
    with nullcontext() if ON_GPU else torch.inference_mode():
        for n in batch or BATCHES:
            spec = spec_of(n)
            timed = common(spec, sglang)
            for name in backend or BACKENDS:
                timed += of_backend(name, spec)
            measure(timed)
            rows += rows_of(spec, timed)
        if mixed:
            timed = of_mixed()
            measure(timed)
            rows += rows_of(MIXED, timed)
    show(rows)
    if out is not None:
        out.write_text(
            json.dumps({"meta": information(commit), "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    if save_as is not None:
        print(save("host_cost", save_as, information(commit), rows))


if __name__ == "__main__":
    typer.run(main)
