"""What the Triton backend says of itself, without Triton: its predicate, its configs, and the order of its sums."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest

from isokern.backends.triton.arguments import CHAINS, constants, options, order_of_sums
from isokern.backends.triton.backend import Triton
from isokern.registry.backend import Config
from isokern.registry.decision import Accepted, RejectCode
from isokern.registry.ops.fused_sigmoid_gating.cases import BASE, CASES
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

BACKEND = Triton()


def problem(spec=BASE, **changes):
    described = canonical_call(**make_inputs(spec).kwargs).problem("eager")
    return replace(described, **{"device": "cuda", "arch": 90, **changes})


def test_importing_the_backend_imports_no_triton():
    code = "import isokern.backends.triton.backend as b, sys; b.Triton().name; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("spec", CASES["extended"], ids=lambda spec: spec.name)
def test_nothing_of_the_contract_is_declined_on_a_gpu(spec):
    assert BACKEND.check(problem(spec)) == Accepted()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": "cpu", "arch": 0}, RejectCode.DEVICE),
        ({"arch": 75}, RejectCode.ARCH),
        ({"io_dtype": "float64"}, RejectCode.DTYPE),
        ({"state_dtype": "float64"}, RejectCode.DTYPE),
        ({"intermediate_dtype": "float64", "intermediates": "chain"}, RejectCode.DTYPE),
        ({"dt_bias_dtype": "float64"}, RejectCode.DTYPE),
        ({"grad": True}, RejectCode.GRAD),
        ({"k": 257}, RejectCode.SHAPE),
        ({"v": 300}, RejectCode.SHAPE),
    ],
)
def test_declines_with_a_reason(changes, code):
    verdict = BACKEND.check(problem(**changes))
    assert not verdict
    assert verdict.code is code
    assert verdict.reason


@pytest.mark.parametrize(
    ("k", "v", "layout", "state", "kda"),
    [*product((1, 5, 64, 96, 128, 256), (1, 40, 192, 256), ("kv", "vk"), (None, "float32", "bfloat16"), (False, True))],
)
def test_configs_suit_the_heads(k, v, layout, state, kda):
    """At least one, none twice, no tile beyond the next power of two, and one that takes all of V."""
    offered = BACKEND.configs(problem(k=k, v=v, state_layout=layout, state_dtype=state, is_kda=kda))
    assert offered
    assert len(set(offered)) == len(offered)
    for config in offered:
        assert config["v_tile"] < 2 * max(v, 1)
        assert config["k_span"] <= CHAINS
        assert config["k_span"] < 2 * max(k, 1)
    assert max(config["v_tile"] for config in offered) >= v


def test_decode_has_no_windows_and_prompts_have():
    decode = problem(BASE.but(lengths=(1,) * 4, padded=()))
    assert {config["window"] for config in BACKEND.configs(decode)} == {0}
    assert all(config["window"] > 1 for config in BACKEND.configs(problem()))


def test_windows_are_read_ahead_where_a_sequence_may_have_more_than_one():
    for lengths, ahead in (((4, 4), False), ((9, 4), True)):
        described = problem(BASE.but(lengths=lengths, padded=(), k=128, v=128))
        config = next(c for c in BACKEND.configs(described) if c["window"] == 4)
        assert constants(described, config)["NEXT"] is ahead
    described = problem()
    unknown = replace(described, profile=replace(described.profile, longest=None))
    assert constants(unknown, config)["NEXT"] is True


def test_a_limit_of_registers_reaches_the_compiler():
    config = Config.of(v_tile=16, k_span=16, warps=1, window=4, stream=False, registers=168)
    assert options(config)["maxnreg"] == 168
    assert "maxnreg" not in options(Config.from_dict({**config.to_dict(), "registers": 0}))


def test_few_sequences_get_many_programs():
    one = problem(BASE.but(lengths=(64,), padded=(), h=4, hv=8, k=128, v=128))
    many = problem(BASE.but(lengths=(4,) * 64, padded=(), h=4, hv=8, k=128, v=128))
    tiles = [constants(p, BACKEND.configs(p)[0])["BV"] for p in (one, many)]
    assert tiles[0] < tiles[1]


@pytest.mark.parametrize(
    ("span", "lanes"), [(s, n) for s in (1, 2, 4, 8, 16, 32) for n in (1, 2, 4, 8, 16, 32) if n <= s]
)
def test_sums_add_keys_in_one_order_whatever_the_lanes(span, lanes):
    """Following ORDER on names instead of numbers: bit 0 of the key first, then 1, 4, 2 and 3."""
    held = [f"{(p % lanes) * (span // lanes) + p // lanes}" for p in range(span)]
    order, levels = order_of_sums(span, lanes), span.bit_length() - 1
    for step in range(levels):
        bit = (order >> (3 * step)) & 7
        held = [
            f"({held[high << (bit + 1) | low]}+{held[high << (bit + 1) | 1 << bit | low]})"
            for high in range(len(held) >> (bit + 1))
            for low in range(1 << bit)
        ]
    by_key = {i: str(i) for i in range(span)}
    for bit in (0, 1, 4, 2, 3):
        if 1 << bit < span:
            by_key = {i: f"({x}+{by_key[i | 1 << bit]})" for i, x in by_key.items() if not i & 1 << bit}
    assert held == [by_key[0]]


def test_two_chains_where_a_span_is_half_of_them():
    for span, k, two in ((32, 128, False), (16, 128, True), (16, 16, False), (8, 8, False)):
        config = Config.of(v_tile=16, k_span=span, warps=1, window=0, stream=False, registers=0)
        assert constants(problem(k=k), config)["TWO"] is two


def test_fingerprint_covers_the_kernel_and_not_its_reports():
    names = {path.name for path in BACKEND.sources()}
    assert {"kernel.py", "tiles.py", "gates.py", "launcher.py"} <= names
    assert not {"gpu_bench.py", "resources.json"} & names
    assert all(path.exists() for path in BACKEND.sources())
