"""On a GPU: captured layers replay with other lengths and slots, nothing waits or compiles behind the user's back."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from isokern import registry
from isokern.errors import ArgumentValueError, BackendFailedError, NotPreparedError
from isokern.registry import Registry
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.varlen.layout import SequenceLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OP = SPEC.name
GPU_BACKENDS = ("triton", "cupy", "numba_cuda", "torch_vectorized")
LAYERS, MAX_N, TOKENS = 8, 8, 24
LAYER = CaseSpec("layer", (TOKENS,), h=2, hv=4, k=64, v=64, extra_slots=19)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    accepted = registry.get(OP).decide(**make_inputs(LAYER, device="cuda").kwargs).outcome_of(request.param)
    if not accepted:
        pytest.skip(f"{request.param}: {accepted}")
    return request.param


def layers_of(count=LAYERS):
    return [dict(make_inputs(LAYER, seed, "cuda").kwargs) for seed in range(count)]


def captured(run):
    """``run`` once as a warm-up, then in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def test_layers_sharing_one_layout_replay_with_other_lengths_and_slots(backend):
    op, draw = registry.get(OP), random.Random(0)
    layers = layers_of()
    layout = SequenceLayout.padded(MAX_N, "cuda", max_length=TOKENS, max_tokens=TOKENS)
    shared = {"cu_seqlens": layout, "initial_state_indices": layout.slots, "backend": backend}
    layout.update((TOKENS,), (0,))
    graph, outputs = captured(lambda: [op(**{**kwargs, **shared}) for kwargs in layers])
    for _ in range(6):
        n = draw.randint(0, MAX_N)
        cuts = sorted(draw.randint(0, TOKENS) for _ in range(n))
        lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
        slots = [s if draw.random() < 0.8 else -1 for s in draw.sample(range(20), n)]
        before = [kwargs["initial_state_source"].clone() for kwargs in layers]
        layout.update(lengths, slots)
        graph.replay()
        torch.cuda.synchronize()
        for kwargs, pool, o in zip(layers, before, outputs, strict=True):
            alone = {**kwargs, "initial_state_source": pool, "cu_seqlens": SequenceLayout.from_lengths(lengths, "cuda")}
            alone["initial_state_indices"] = torch.tensor(slots, dtype=torch.int32, device="cuda")
            expected = op(**alone, backend=backend)
            torch.testing.assert_close(o[:, : sum(lengths)], expected[:, : sum(lengths)], rtol=2e-2, atol=1e-3)
            torch.testing.assert_close(kwargs["initial_state_source"], pool, rtol=1e-4, atol=1e-4)
            unnamed = [s for s in range(20) if s not in slots]
            assert torch.equal(kwargs["initial_state_source"][unnamed], pool[unnamed])


def test_nothing_waits_for_the_device(backend):
    """torch reports every synchronisation it knows of as an error in this mode."""
    if backend == "torch_vectorized":
        pytest.skip("plain torch operators may wait")
    op, kwargs = registry.get(OP), layers_of(1)[0]
    lengths = (8, 0, 16)
    slots = torch.tensor((1, 2, 3), dtype=torch.int32, device="cuda")
    padded = SequenceLayout.padded(3, "cuda", max_length=TOKENS)
    op(
        **{
            **kwargs,
            "cu_seqlens": SequenceLayout.from_lengths(lengths, "cuda"),
            "initial_state_indices": slots,
            "backend": backend,
        }
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = SequenceLayout.from_lengths(lengths, "cuda")
        layout.device_chunk_offsets(16)
        layout.device_split(8)
        padded.update(lengths, (4, 5, 6))
        for cu in (layout, layout.cu_seqlens, padded):
            for _ in range(2):
                op(**{**kwargs, "cu_seqlens": cu, "initial_state_indices": slots, "backend": backend})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_capture_nothing_compiles(backend):
    """A registry of its own has compiled nothing yet."""
    if backend == "torch_vectorized":
        pytest.skip("has nothing to compile")
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    own.register_backend(registry.backends(OP)[backend])
    op, kwargs = own.get(OP), layers_of(1)[0]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(NotPreparedError, match=backend), torch.cuda.graph(graph):
        op(**kwargs, backend=backend)
    op.prepare(**kwargs, backend=backend)
    before = kwargs["initial_state_source"].clone()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        op(**kwargs, backend=backend)
    assert torch.equal(kwargs["initial_state_source"], before), "captured, not run"


def test_what_would_wait_is_refused_in_a_capture():
    op, kwargs = registry.get(OP), layers_of(1)[0]
    layout = SequenceLayout.padded(1, "cuda")
    op(**kwargs)
    for refused in (lambda: op(**kwargs, validate="full"), lambda: layout.update((1,))):
        with pytest.raises(ArgumentValueError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            refused()


def test_two_threads_on_two_streams_share_nothing(backend):
    op, results = registry.get(OP), {}
    kinds = [layers_of(2)[i] for i in range(2)]
    expected = [op(**{**k, "initial_state_source": k["initial_state_source"].clone()}, backend=backend) for k in kinds]
    torch.cuda.synchronize()

    def work(which):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            pools = [kinds[which]["initial_state_source"].clone() for _ in range(50)]
            results[which] = [op(**{**kinds[which], "initial_state_source": p}, backend=backend) for p in pools]
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert all(torch.equal(o, expected[which]) for o in results[which])


@pytest.mark.parametrize("known", [True, False], ids=["known", "first"])
def test_a_thread_that_has_done_nothing_else_with_cuda_may_call(backend, known):
    """Given its output, the call is the first thing that such a thread asks of the device."""
    op, kwargs = registry.get(OP), layers_of(1)[0]
    scale = 0.5 if known else 0.25  # a call like an earlier one, or a new one
    pool = kwargs["initial_state_source"]
    given = {**kwargs, "out": torch.empty_like(kwargs["v"]), "scale": scale, "backend": backend}
    if known:
        op(**{**given, "initial_state_source": pool.clone()})
    expected = op(**{**given, "initial_state_source": pool.clone(), "out": None})
    torch.cuda.synchronize()
    failed = []

    def work():
        try:
            op(**given)
        except BackendFailedError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert torch.equal(given["out"], expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_compile_changes_nothing(dynamic):
    torch.compiler.reset()
    op = registry.get(OP)
    compiled = torch.compile(lambda kwargs: op(**kwargs) * 2, fullgraph=True, dynamic=dynamic)
    for lengths in ((TOKENS,), (3, 0, 9)):
        one, two = (make_inputs(LAYER.but(lengths=lengths), device="cuda") for _ in range(2))
        torch.testing.assert_close(compiled(one.kwargs), op(**two.kwargs) * 2, rtol=0, atol=0)
        assert torch.equal(one.pool_storage, two.pool_storage)


def test_a_pinned_call_is_an_unpinned_one(backend):
    """The second call of a kind is pinned where the backend can; its bits are the first one's."""
    op = registry.get(OP)
    for spec in (
        LAYER,
        LAYER.but(is_kda=True, state_layout="vk"),
        LAYER.but(update="separate", verify="chain", strides="rows"),
    ):
        first, second = (make_inputs(spec, device="cuda") for _ in range(2))
        assert torch.equal(op(**first.kwargs, backend=backend), op(**second.kwargs, backend=backend))
        assert torch.equal(first.pool_storage, second.pool_storage)
