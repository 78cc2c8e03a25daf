"""Properties of a busy device: repeatability under load, threads on streams of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ...registry.backend import Backend, Runner
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .calls import able, bind, call_of, copy_contents, same_bits, written
from .cases import DECODE, REPRESENTATIVE

__all__ = ["repeatable_under_load", "two_threads"]

_REPEATS = 50
#: Launches of load between two waits: enough to keep the device busy, few enough to stop soon.
_BURST = 16
_THREAD_CALLS = 64
#: Fills the chip: many blocks of one launch then run beside the load, in an order that differs each time.
_WIDE = DECODE.but(name="decode N=64", lengths=(1,) * 64, h=16, hv=32, padded=())


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def _load(stop: threading.Event) -> None:
    """Matrix products on one stream and copies on another until ``stop``."""
    products, copies = _stream(), _stream()
    with torch.cuda.stream(products):
        x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(copies):
        source = torch.randint(256, (64 << 20,), device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
    while not stop.is_set():
        with torch.cuda.stream(products):
            for _ in range(_BURST):
                x @ x
        with torch.cuda.stream(copies):
            for _ in range(_BURST):
                target.copy_(source)
        products.synchronize()
        copies.synchronize()


def repeatable_under_load(backend: Backend) -> Iterator[str]:
    """The same call 50 times beside matrix products and copies on other streams: the bits of a quiet device."""
    for spec in able(backend, (*REPRESENTATIVE, _WIDE), call_of):
        fresh, call = call_of(spec), call_of(spec)
        run = bind(backend, call)
        run(call)
        torch.cuda.synchronize()
        quiet = written(call)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(_load, stop)
            try:
                differing = _repeat(run, call, fresh, quiet)
            finally:
                stop.set()
            load.result()
        if differing:
            yield f"{spec.name}: {differing} of {_REPEATS} repetitions left other bits"


def _repeat(run: Runner, call: Call, fresh: Call, quiet: tuple[torch.Tensor, ...]) -> int:
    stream = _stream()
    differing = 0
    with torch.cuda.stream(stream):
        for _ in range(_REPEATS):
            copy_contents(call, fresh)
            run(call)
            differing += not same_bits(written(call), quiet)
    return differing


def two_threads(backend: Backend) -> Iterator[str]:
    """Two threads share a runner, each on a stream and tensors of its own: what each leaves is what one alone does."""
    spec = CaseSpec("threads", (3, 1, 2, 0, 4), k=128, v=128, padded=(1,), state_layout="vk")
    seeds = (1, 2)
    run = bind(backend, call_of(spec))
    expected = []
    for seed in seeds:
        call = call_of(spec, seed=seed)
        for _ in range(_THREAD_CALLS):
            run(call)
        torch.cuda.synchronize()
        expected.append(written(call))
    together = threading.Barrier(len(seeds))
    calls = [call_of(spec, seed=seed) for seed in seeds]
    torch.cuda.synchronize()

    def work(call: Call) -> None:
        stream = _stream()
        with torch.cuda.stream(stream):
            together.wait(timeout=60)
            for _ in range(_THREAD_CALLS):
                run(call)
            stream.synchronize()

    with ThreadPoolExecutor(len(seeds)) as pool:
        for done in [pool.submit(work, call) for call in calls]:
            done.result()
    for seed, call, alone in zip(seeds, calls, expected, strict=True):
        if not same_bits(written(call), alone):
            yield f"thread {seed}: other bits than alone"
