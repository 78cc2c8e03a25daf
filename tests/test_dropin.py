"""Other libraries' functions on isokern: their signatures, their semantics against the float64 reference, refusals."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch

from isokern.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from isokern.integrations import fla, flashinfer, sglang, vllm
from isokern.integrations.arguments import rethrow
from isokern.integrations.gates import raw_beta, raw_decay
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

U = 2.0**-24


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- signatures: parameters and defaults as read on 2026-11-22 (flash-linear-attention 0.6.0) and 2026-11-24
# (FlashInfer 0.7.2.post1)

ORIGINALS = {
    (sglang, "fused_sigmoid_gating_delta_rule_update"): (
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent",
        "A_log a dt_bias softplus_beta softplus_threshold q k v b initial_state_source initial_state_indices "
        "scale=None use_qk_l2norm_in_kernel=False cu_seqlens=None is_kda=False lower_bound=None "
        "disable_state_update=False intermediate_states_buffer=None intermediate_state_indices=None cache_steps=None "
        "retrieve_parent_token=None cache_ring=False replayssm_rawv=None replayssm_rawk=None replayssm_g=None "
        "replayssm_beta=None match_cutedsl_decode=False",
    ),
    (fla, "fused_recurrent_gated_delta_rule"): (
        "fla.ops.gated_delta_rule",
        "q k v g=None gk=None gv=None beta=None scale=None initial_state=None output_final_state=False "
        "use_qk_l2norm_in_kernel=False use_gate_in_kernel=False A_log=None dt_bias=None "
        "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False cu_seqlens=None **kwargs",
    ),
    (fla, "chunk_gated_delta_rule"): (
        "fla.ops.gated_delta_rule",
        "q k v g beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
        "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False state_v_first=False cu_seqlens=None "
        "cu_seqlens_cpu=None chunk_indices=None cp_context=None **kwargs",
    ),
    (fla, "fused_recurrent_kda"): (
        "fla.ops.kda",
        "q k v g beta A_log=None dt_bias=None scale=None initial_state=None output_final_state=False "
        "use_qk_l2norm_in_kernel=False use_gate_in_kernel=False use_beta_sigmoid_in_kernel=False "
        "allow_neg_eigval=False lower_bound=None state_v_first=False cu_seqlens=None **kwargs",
    ),
    (fla, "chunk_kda"): (
        "fla.ops.kda",
        "q k v g beta scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False "
        "use_gate_in_kernel=False use_beta_sigmoid_in_kernel=False allow_neg_eigval=False safe_gate=False "
        "lower_bound=None disable_recompute=False return_intermediate_states=False state_v_first=False "
        "cu_seqlens=None cu_seqlens_cpu=None cp_context=None use_graph=False max_num_seqs=None **kwargs",
    ),
    (vllm, "fused_sigmoid_gating_delta_rule_update"): (
        "vllm.model_executor.layers.fla.ops.fused_sigmoid_gating",
        "A_log a b dt_bias q k v beta=1.0 threshold=20.0 scale=None initial_state=None inplace_final_state=True "
        "cu_seqlens=None ssm_state_indices=None num_accepted_tokens=None use_qk_l2norm_in_kernel=False is_kda=False",
    ),
    (flashinfer, "gated_delta_rule_decode_pretranspose"): (
        "flashinfer.gdn_decode",
        "q k v state A_log a dt_bias b scale=None output=None use_qk_l2norm=True initial_state=None "
        "initial_state_indices=None output_state_indices=None intermediate_states_buffer=None "
        "disable_state_update=False backend=auto",
    ),
    (flashinfer, "chunk_gated_delta_rule"): (
        "flashinfer.gdn_prefill",
        "q k v g=None beta=None scale=None initial_state=None output_final_state=False cu_seqlens=None "
        "use_qk_l2norm_in_kernel=False output=None output_state=None state_checkpoints=None "
        "checkpoint_cu_starts=None checkpoint_every_n_tokens=0 use_cp=auto state_indices=None _cp_chunk_len=None "
        "backend=auto max_seqlen=None",
    ),
}


def parameters(function):
    """``name``, ``name=default``, ``*name=default`` (keyword only), ``**kwargs``, in order."""
    found = []
    for p in inspect.signature(function).parameters.values():
        mark = {p.KEYWORD_ONLY: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        found.append(f"{mark}{p.name}" + ("" if p.default is p.empty else f"={p.default}"))
    return found


@pytest.mark.parametrize("key", ORIGINALS, ids=lambda key: f"{key[0].__name__.rpartition('.')[2]}-{key[1]}")
def test_signatures_are_the_originals(key):
    ours = getattr(*key)
    module, recorded = ORIGINALS[key]
    assert parameters(ours) == recorded.split()
    try:
        original = getattr(importlib.import_module(module), key[1])
    except ImportError:
        return  # not installed beside these tests: what was recorded stands for it
    assert parameters(ours) == parameters(inspect.unwrap(original))


# ---- undoing gates


def test_a_decay_comes_back_within_the_stated_error():
    g = -torch.logspace(-29, 2, 4001, dtype=torch.float64).to(torch.float32)
    back = -torch.nn.functional.softplus(raw_decay(g).double(), threshold=100)
    y = -g.double()
    assert bool(((back + y).abs() <= y * U * (2 * y.log().abs().clamp(min=1) + 4)).all())
    assert raw_decay(torch.tensor([0.0, -math.inf])).isfinite().all()
    assert raw_decay(torch.tensor([1e-3, math.nan])).isnan().all(), "a growing state has no such gate"


def test_a_beta_comes_back_within_the_stated_error():
    beta = torch.cat([torch.logspace(-29, 0, 2000), torch.linspace(0.01, 1.999, 2000)])
    b = raw_beta(beta).double()
    back, half = 2 * torch.sigmoid(b), beta.double() / 2
    assert bool(((back - beta.double()).abs() <= beta.double() * U * (2 * b.abs() + 4)).all())
    assert bool((back <= 2).all() and (half > 0).all())
    ends = 2 * torch.sigmoid(raw_beta(torch.tensor([0.0, 1.0, 2.0])).double())
    assert torch.allclose(ends, torch.tensor([0.0, 1.0, 2.0]).double(), atol=2 * U)
    assert raw_beta(torch.tensor([-0.1, 2.1])).isnan().all()


def test_gradients_at_the_ends_are_those_of_the_gates():
    g = torch.tensor([0.0, -1e-6, -0.5, -30.0], requires_grad=True)
    (-torch.nn.functional.softplus(raw_decay(g).double(), threshold=100)).sum().backward()
    assert torch.allclose(g.grad, torch.ones(4), rtol=1e-5)
    beta = torch.tensor([0.0, 1e-6, 1.0, 1.9], requires_grad=True)
    (2 * torch.sigmoid(raw_beta(beta).double())).sum().backward()
    assert torch.allclose(beta.grad, torch.ones(4), rtol=1e-5)


# ---- names in errors


@pytest.mark.parametrize("kind", [ArgumentValueError, ArgumentTypeError])
@pytest.mark.parametrize("hint", ["", "use torch.no_grad()"])
def test_an_error_of_the_op_names_the_callers_argument_and_is_otherwise_the_same(kind, hint):
    op = kind("b", "shape [2]", "shape [3]", hint)
    with pytest.raises(kind) as caught:
        rethrow(op, {"a": "g", "b": "beta"})
    assert str(caught.value) == str(kind("beta", "shape [2]", "shape [3]", hint))
    assert (caught.value.argument, caught.value.expected, caught.value.given) == ("beta", "shape [2]", "shape [3]")
    assert caught.value.__cause__ is op
    with pytest.raises(kind) as caught:
        rethrow(op, {"a": "g"})
    assert caught.value is op, "a name that both know"


def refused(function, made, **changed):
    """The error of a call with an argument changed; no tensor of the call is written."""
    arguments = {**made, **changed}
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ArgumentError) as caught:
        function(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name].nan_to_num(), value.nan_to_num()), f"{name} has been written"
    return caught.value


# ---- SGLang

PACKED = CaseSpec("packed", (5, 0, 1, 9), k=8, v=12, h=2, hv=6, padded=(2,), state_layout="vk", l2norm=True)
SGLANG = {
    "decode": PACKED.but(varlen=False, lengths=(1, 1, 1), padded=(1,), as_layout=False),
    "packed": PACKED,
    "kda": PACKED.but(is_kda=True),
    "kda-bounded": PACKED.but(is_kda=True, lower_bound=-5.0, scale=0.3),
    "low-precision": PACKED.but(io_dtype="bfloat16", state_dtype="bfloat16"),
    "verify": PACKED.but(verify="chain", update="disabled"),
    "tree": PACKED.but(verify="tree"),
    "strided": PACKED.but(strides="rows"),
}
NOT_SGLANG = ("state_layout", "allow_neg_eigval", "max_seqlen", "out", "output_state_indices")


def judged(call, out, truth):
    verdict = judge(call, out, truth)
    assert verdict.ok, verdict.faults


@pytest.mark.parametrize("name", SGLANG)
def test_sglang_runs_the_op_on_its_own_states(name):
    spec = SGLANG[name]
    kwargs = make_inputs(spec).kwargs
    call = canonical_call(**kwargs)
    truth = reference(call, chunk=None if call.intermediates is not None else 64)
    cu = kwargs.pop("cu_seqlens", None)
    kwargs["cu_seqlens"] = getattr(cu, "cu_seqlens", cu)
    for unknown in NOT_SGLANG:
        kwargs.pop(unknown, None)
    if call.intermediates is not None:
        kwargs["cache_steps"] = call.intermediates.shape[1]
    judged(call, sglang.fused_sigmoid_gating_delta_rule_update(**kwargs), truth)


def test_sglang_takes_gates_flattened_over_the_batch():
    spec = SGLANG["decode"].but(is_kda=True)
    kwargs = make_inputs(spec).kwargs
    call = canonical_call(**kwargs)
    truth = reference(call)
    for unknown in NOT_SGLANG:
        kwargs.pop(unknown, None)
    kwargs["a"], kwargs["b"] = kwargs["a"].reshape(3, -1), kwargs["b"].reshape(3, -1)
    kwargs["A_log"], kwargs["dt_bias"] = kwargs["A_log"].view(1, 1, -1, 1), kwargs["dt_bias"].flatten()
    judged(call, sglang.fused_sigmoid_gating_delta_rule_update(**kwargs), truth)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_ring", True),
        ("replayssm_g", torch.zeros(1)),
        ("match_cutedsl_decode", True),
        ("cache_steps", 3),
        ("cache_steps", 0),
        ("lower_bound", -5.0),
        ("retrieve_parent_token", torch.zeros(3, 1, dtype=torch.int64)),
    ],
)
def test_sglang_refuses_what_it_would_have_to_ignore(name, value):
    kwargs = make_inputs(SGLANG["decode"]).kwargs
    for unknown in NOT_SGLANG:
        kwargs.pop(unknown, None)
    before = kwargs["initial_state_source"].clone()
    with pytest.raises(ArgumentValueError, match=f"^{name}:"):
        sglang.fused_sigmoid_gating_delta_rule_update(**{**kwargs, name: value})
    assert torch.equal(kwargs["initial_state_source"], before)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("q", None, ArgumentTypeError),
        ("A_log", None, ArgumentTypeError),
        ("a", torch.zeros(4, 6), ArgumentValueError),
        ("b", torch.zeros(4, 6), ArgumentValueError),
        ("cu_seqlens", [0, 1, 2, 3], ArgumentTypeError),
        ("cache_steps", 2.0, ArgumentTypeError),
        ("intermediate_states_buffer", torch.zeros(3), ArgumentValueError),
        ("retrieve_parent_token", [[0]], ArgumentTypeError),
    ],
)
def test_sglang_errors_name_the_argument(name, value, error):
    kwargs = make_inputs(SGLANG["decode"]).kwargs
    for unknown in NOT_SGLANG:
        kwargs.pop(unknown, None)
    kwargs.update(intermediate_states_buffer=torch.zeros(3, 1, 6, 12, 8), cache_steps=1)
    raised = refused(sglang.fused_sigmoid_gating_delta_rule_update, kwargs, **{name: value})
    assert (type(raised), raised.argument) == (error, name)


# ---- flash-linear-attention


def fla_case(kda, lengths=(5, 0, 1, 9), seed=0, **options):
    """Inputs with gates as numbers, and the canonical call, in float64 gates, that they stand for."""
    g = torch.Generator().manual_seed(seed)
    tokens, (h, hv, k, v) = sum(lengths), (2, 6, 8, 12)
    made = {
        "q": torch.randn(1, tokens, h, k, generator=g),
        "k": torch.randn(1, tokens, h, k, generator=g),
        "v": torch.randn(1, tokens, hv, v, generator=g),
        "g": -torch.rand((1, tokens, hv, k) if kda else (1, tokens, hv), generator=g) * 2,
        "beta": torch.rand(1, tokens, hv, generator=g),
        "initial_state": torch.randn(len(lengths), hv, k, v, generator=g),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        "use_qk_l2norm_in_kernel": True,
    }
    made.update(options)
    return made


def exact(made, raw_g=None, raw_b=None, lower_bound=None, neg=True):
    """The canonical call with the same meaning: gates undone in float64, which is exact beside float32's bound."""
    kda, hv = made["g"].dim() == 4, made["v"].shape[2]
    shape = (hv, made["q"].shape[3]) if kda else (hv,)
    A_log, bias = raw_g if raw_g is not None else (torch.zeros(hv), torch.zeros(shape))
    state = made["initial_state"].clone() if made.get("initial_state") is not None else torch.zeros(4, hv, 8, 12)
    return canonical_call(
        A_log, made["g"] if raw_g is not None else raw_decay(made["g"].double()), bias, 1.0, 20.0,
        made["q"], made["k"], made["v"], made["beta"] if raw_b else raw_beta(made["beta"].double()), state,
        torch.arange(state.shape[0]), made.get("scale"), made["use_qk_l2norm_in_kernel"], made["cu_seqlens"],
        is_kda=kda, lower_bound=lower_bound, allow_neg_eigval=neg,
    )  # fmt: skip


def assert_fla(function, made, call):
    truth = reference(call, chunk=64)
    before = None if made.get("initial_state") is None else made["initial_state"].clone()
    o, final = function(**made, output_final_state=True)
    assert final.dtype == torch.float32
    call.pool.copy_(final.transpose(-1, -2) if made.get("state_v_first") else final)
    judged(call, o, truth)
    assert before is None or torch.equal(made["initial_state"], before), "the initial state is not the op's to change"
    alone, nothing = function(**made)
    assert nothing is None
    judged(call, alone, truth)


GDN, KDA = (fla.fused_recurrent_gated_delta_rule, fla.chunk_gated_delta_rule), (fla.fused_recurrent_kda, fla.chunk_kda)


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_with_gates_as_numbers(function):
    made = fla_case(function in KDA)
    made["beta"][0, :4] = torch.tensor([0.0, 1.0, 2.0, 1.5]).unsqueeze(-1)
    made["g"][0, 1:3] = 0
    made["g"][0, 3] = -1e4
    assert_fla(function, made, exact(made))


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_without_l2norm_or_states_and_its_own_scale(function):
    made = fla_case(function in KDA, use_qk_l2norm_in_kernel=False, scale=0.25, initial_state=None)
    made["k"] = made["k"] * 0.3
    assert_fla(function, made, exact(made))


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_with_raw_gates(function):
    kda = function in KDA
    made = fla_case(kda)
    A_log, bias = torch.randn(6), torch.randn((6, 8) if kda else (6,))
    made["g"], made["beta"] = -made["g"] - 1, made["beta"] * 4 - 2
    call = exact(made, (A_log, bias), True)
    options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    assert_fla(function, {**made, **options, "A_log": A_log, "dt_bias": bias.flatten()}, call)
    plain = exact(made, (A_log, torch.zeros_like(bias)), True, neg=False)
    assert_fla(function, {**made, **options, "A_log": A_log, "allow_neg_eigval": False}, plain)


@pytest.mark.parametrize("function", KDA, ids=lambda f: f.__name__)
def test_fla_bounded_gates(function):
    made = fla_case(True)
    call = exact(made, (torch.zeros(6), torch.zeros(6, 8)), lower_bound=-5.0)
    assert_fla(function, {**made, "use_gate_in_kernel": True, "lower_bound": -5.0}, call)


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_states_with_v_first(function):
    made = fla_case(function in KDA)
    call = exact(made)
    made["initial_state"] = made["initial_state"].transpose(-1, -2).contiguous()
    assert_fla(function, {**made, "state_v_first": True}, call)
    former = {**made, "transpose_state_layout": True}
    assert torch.equal(function(**former)[0], function(**made, state_v_first=True)[0])


def test_fla_recurrent_defaults_and_decays_per_channel():
    made = fla_case(False)
    ones = {**made, "g": torch.zeros_like(made["g"]), "beta": torch.ones_like(made["beta"])}
    bare = {name: value for name, value in made.items() if name not in ("g", "beta")}
    assert_fla(fla.fused_recurrent_gated_delta_rule, bare, exact(ones))
    per_channel = fla_case(True)
    both = {**per_channel, "gk": per_channel["g"], "g": made["g"]}
    total = {**per_channel, "g": per_channel["g"] + made["g"].unsqueeze(-1)}
    assert_fla(fla.fused_recurrent_gated_delta_rule, both, exact(total))


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_gradients_are_those_of_the_recurrence(function):
    kda = function in KDA
    made = fla_case(kda, lengths=(4, 3))
    leaves = {name: made[name].clone().requires_grad_() for name in ("q", "k", "v", "g", "beta", "initial_state")}
    o, _ = function(**{**made, **leaves})
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((o * weight).sum(), list(leaves.values()))

    double = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    expected = torch.autograd.grad((written_out(double, made["cu_seqlens"]) * weight).sum(), list(double.values()))
    for name, mine, truth in zip(leaves, got, expected, strict=True):
        assert torch.allclose(mine.double(), truth, atol=1e-4 * float(truth.abs().max())), name


def written_out(x, cu):
    """The recurrence in float64, one token at a time, by autograd."""
    rows = []
    norm = [t / torch.sqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (x["q"], x["k"])]
    q, k = (t.repeat_interleave(3, dim=2)[0] for t in norm)
    for n, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        state = x["initial_state"][n]
        for t in range(start, end):
            decay = x["g"][0, t].exp()
            state = state * (decay.unsqueeze(-1) if decay.dim() == 2 else decay[:, None, None])
            u = x["beta"][0, t].unsqueeze(-1) * (x["v"][0, t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t].unsqueeze(-1) * u.unsqueeze(-2)
            rows.append(torch.einsum("hkv,hk->hv", state, q[t]) * 8**-0.5)
    return torch.stack(rows).unsqueeze(0)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (fla.fused_recurrent_gated_delta_rule, "gv", torch.zeros(1)),
        (fla.fused_recurrent_gated_delta_rule, "A_log", torch.zeros(6)),
        (fla.fused_recurrent_gated_delta_rule, "reverse", True),
        (fla.fused_recurrent_gated_delta_rule, "allow_neg_eigval", True),
        (fla.chunk_gated_delta_rule, "chunk_size", 64),
        (fla.chunk_gated_delta_rule, "chunk_indices", torch.zeros(1)),
        (fla.chunk_gated_delta_rule, "cp_context", object()),
        (fla.chunk_gated_delta_rule, "head_first", True),
        (fla.chunk_gated_delta_rule, "dt_bias", torch.zeros(6)),
        (fla.fused_recurrent_kda, "lower_bound", -5.0),
        (fla.fused_recurrent_kda, "num_accepted_tokens", torch.zeros(4)),
        (fla.chunk_kda, "return_intermediate_states", True),
        (fla.chunk_kda, "disable_recompute", True),
        (fla.chunk_kda, "use_graph", True),
        (fla.chunk_kda, "max_num_seqs", 8),
    ],
)
def test_fla_refuses_what_it_would_have_to_ignore(function, name, value):
    made = fla_case(function in KDA)
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=f"^{name}:"):
        function(**made, **{name: value})


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("q", None, ArgumentTypeError),
        ("v", torch.zeros(15, 6, 12), ArgumentValueError),
        ("k", torch.zeros(1, 15, 3, 8), ArgumentValueError),
        ("g", torch.zeros(1, 1, 6), ArgumentValueError),
        ("beta", torch.ones(1, 15, 5), ArgumentValueError),
        ("initial_state", torch.zeros(4, 6, 8, 13), ArgumentValueError),
        ("initial_state", torch.zeros(4), ArgumentValueError),
        ("initial_state", [0.0], ArgumentTypeError),
        ("cu_seqlens", [0, 5, 5, 6, 15], ArgumentTypeError),
        ("cu_seqlens", torch.tensor([0.0, 5.0, 5.0, 6.0, 15.0]), ArgumentTypeError),
        ("cu_seqlens", torch.tensor([0, 5, 4, 6, 15]), ArgumentValueError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int64), ArgumentValueError),
        ("scale", 0.0, ArgumentValueError),
    ],
)
def test_fla_errors_name_the_callers_argument(function, name, value, error):
    raised = refused(function, fla_case(function in KDA), **{name: value})
    assert (type(raised), raised.argument) == (error, name)


def test_fla_errors_keep_what_the_op_expected_and_was_given():
    raised = refused(fla.chunk_gated_delta_rule, fla_case(False), g=torch.zeros(1, 14, 6))
    assert (raised.expected, raised.given) == ("[B, T, HV] = [1, 15, 6]", "shape [1, 14, 6]")
    assert raised.__cause__.argument == "a"
    per_channel = fla_case(True)
    per_channel["gk"] = per_channel.pop("g")[:, :-1]
    assert refused(fla.fused_recurrent_gated_delta_rule, per_channel).argument == "gk"
    per_channel["gk"] = fla_case(True)["g"]
    assert refused(fla.fused_recurrent_gated_delta_rule, per_channel, g=torch.zeros(1, 1, 6)).argument == "g"


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
@pytest.mark.parametrize("raw", [False, True])
def test_fla_gates_are_required_where_the_original_cannot_do_without(function, raw):
    made = fla_case(function in KDA, use_gate_in_kernel=raw, use_beta_sigmoid_in_kernel=raw)
    made.update({"A_log": torch.zeros(6)} if raw else {})
    served = function is fla.fused_recurrent_gated_delta_rule and not raw
    for name in ("g", "beta"):
        if served:
            assert function(**{**made, name: None})[0].isfinite().all()
        else:
            raised = refused(function, made, **{name: None})
            assert (type(raised), raised.argument) == (ArgumentTypeError, name)


@pytest.mark.parametrize("function", [*GDN, *KDA], ids=lambda f: f.__name__)
def test_fla_refuses_betas_per_value_channel(function):
    raised = refused(function, fla_case(function in KDA), beta=torch.rand(1, 15, 6, 12))
    assert "betas per value channel are not served" in str(raised)
    assert raised.argument == "beta"


def test_fla_refuses_a_final_state_that_gradients_would_not_reach():
    made = fla_case(False)
    made["q"].requires_grad_()
    with pytest.raises(ArgumentValueError, match=r"^output_final_state:.*no_grad"):
        fla.chunk_gated_delta_rule(**made, output_final_state=True)
    with pytest.raises(ArgumentValueError, match=r"^initial_state: expected 4 states"):
        fla.chunk_gated_delta_rule(**{**made, "initial_state": made["initial_state"][:3]})


def test_fla_lengths_on_the_host_are_used():
    made = fla_case(False)
    host = made["cu_seqlens"].clone()
    assert torch.equal(
        fla.chunk_gated_delta_rule(**made, cu_seqlens_cpu=host)[0], fla.chunk_gated_delta_rule(**made)[0]
    )
    for wrong in (host[:-1], host.tolist(), host.float(), host - 1):
        assert refused(fla.chunk_gated_delta_rule, made, cu_seqlens_cpu=wrong).argument == "cu_seqlens_cpu"


# ---- vLLM


def vllm_case(lengths, table, accepted=None, seed=0, dtype=torch.float32, varlen=True):
    g = torch.Generator().manual_seed(seed)
    tokens, n, (h, hv, k, v) = sum(lengths), len(lengths), (2, 6, 8, 12)
    lead = (1, tokens) if varlen else (n, lengths[0])
    return {
        "A_log": torch.randn(hv, generator=g),
        "a": torch.randn(*lead, hv, generator=g),
        "b": torch.randn(*lead, hv, generator=g),
        "dt_bias": torch.randn(hv, generator=g),
        "q": torch.randn(*lead, h, k, generator=g),
        "k": torch.randn(*lead, h, k, generator=g),
        "v": torch.randn(*lead, hv, v, generator=g),
        "initial_state": torch.randn(12, hv, v, k, generator=g).to(dtype),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if varlen else None,
        "ssm_state_indices": torch.tensor(table, dtype=torch.int32),
        "num_accepted_tokens": None if accepted is None else torch.tensor(accepted, dtype=torch.int32),
        "use_qk_l2norm_in_kernel": True,
    }


def vllm_judged(made, lengths):
    """Each token's state in its slot, everything else as it was, outputs within the bound."""
    table = made["ssm_state_indices"]
    table = table if table.dim() == 2 else table.unsqueeze(-1)
    accepted = made["num_accepted_tokens"]
    first = [
        int(table[n, 0 if accepted is None else int(accepted[n]) - 1])
        if accepted is None or 0 < accepted[n] <= table.shape[1]
        else -1
        for n in range(len(lengths))
    ]
    shared = [made[name] for name in ("A_log", "a", "dt_bias")]
    pool = made["initial_state"].clone()
    steps = max(lengths)
    buffer = torch.zeros(len(lengths), steps, *pool.shape[1:], dtype=pool.dtype)
    call = canonical_call(
        *shared, 1.0, 20.0, made["q"], made["k"], made["v"], made["b"], pool, torch.tensor(first), None, True,
        made["cu_seqlens"], state_layout="vk", disable_state_update=True, intermediate_states_buffer=buffer,
        intermediate_state_indices=torch.arange(len(lengths)),
    )  # fmt: skip
    truth = reference(call)
    o, same = vllm.fused_sigmoid_gating_delta_rule_update(**made)
    assert same is made["initial_state"]
    written = set()
    for n, length in enumerate(lengths):
        for t in range(length):
            slot = int(table[n, t])
            if slot >= 0 and first[n] >= 0:
                buffer[n, t] = same[slot]
                written.add(slot)
            else:  # nothing to look at: the reference's own value stands in
                buffer[n, t] = truth.steps[truth.offsets[n] + t].transpose(-1, -2).to(buffer.dtype)
    judged(call, o, truth)
    for slot in range(pool.shape[0]):
        assert slot in written or torch.equal(same[slot], pool[slot]), f"slot {slot} is nobody's"
    return written


@pytest.mark.parametrize("varlen", [True, False])
def test_vllm_decodes_from_and_to_one_slot(varlen):
    made = vllm_case((1, 1, 1, 1), [7, -1, 0, 3], varlen=varlen)
    assert vllm_judged(made, (1, 1, 1, 1)) == {7, 0, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_keeps_the_state_of_each_token_and_starts_from_the_last_accepted(dtype):
    table = [[4, 9, 2], [-1, -1, -1], [1, 0, -1], [11, 10, 8], [5, 6, 7]]
    made = vllm_case((3, 2, 3, 0, 1), table, accepted=(2, 1, 1, 3, 3), dtype=dtype)
    assert vllm_judged(made, (3, 2, 3, 0, 1)) == {4, 9, 2, 1, 0, 5}


def test_vllm_starts_from_the_first_slot_where_nothing_says_otherwise():
    made = vllm_case((2, 2), [[3, 4], [8, 1]], varlen=False)
    assert vllm_judged(made, (2, 2)) == {3, 4, 8, 1}


def test_vllm_with_nothing_accepted_or_no_slot_at_all_writes_nothing():
    assert vllm_judged(vllm_case((2, 2), [[3, 4], [8, 1]], accepted=(0, 0)), (2, 2)) == set()
    assert vllm_judged(vllm_case((2, 2), [[3, 4], [8, 1]], accepted=(2, 3)), (2, 2)) == {3, 4}
    assert vllm_judged(vllm_case((2, 1), [[-1, -1], [-1, -1]]), (2, 1)) == set()


def test_vllm_kda():
    made = vllm_case((1, 1), [3, 5])
    made.update(a=torch.randn(1, 2, 6, 8), dt_bias=torch.randn(6, 8))
    before = made["initial_state"].clone()
    call = canonical_call(
        made["A_log"], made["a"], made["dt_bias"], 1.0, 20.0, made["q"], made["k"], made["v"], made["b"],
        before, torch.tensor([3, 5]), None, True, made["cu_seqlens"], state_layout="vk", is_kda=True,
    )  # fmt: skip
    truth = reference(call)
    o, after = vllm.fused_sigmoid_gating_delta_rule_update(**made, is_kda=True)
    before.copy_(after)
    judged(call, o, truth)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("inplace_final_state", False, ArgumentValueError),
        ("initial_state", None, ArgumentTypeError),
        ("ssm_state_indices", None, ArgumentTypeError),
        ("ssm_state_indices", torch.tensor([1, 2, 3]), ArgumentValueError),
        ("ssm_state_indices", torch.tensor([1, 2]), ArgumentValueError),
        ("ssm_state_indices", torch.tensor([[[1]], [[2]]]), ArgumentValueError),
    ],
)
def test_vllm_refuses_what_it_would_have_to_ignore(name, value, error):
    made = vllm_case((2, 2), [[3, 4], [8, 1]])
    with pytest.raises(error, match=f"^{name}:"):
        vllm.fused_sigmoid_gating_delta_rule_update(**{**made, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("beta", 0.0, ArgumentValueError),
        ("threshold", "20", ArgumentTypeError),
        ("q", None, ArgumentTypeError),
        ("initial_state", torch.zeros(12, 6, 12, 9), ArgumentValueError),
        ("initial_state", [0.0], ArgumentTypeError),
        ("ssm_state_indices", torch.tensor([[3.0, 4.0], [8.0, 1.0]]), ArgumentTypeError),
        ("ssm_state_indices", [[3, 4], [8, 1]], ArgumentTypeError),
        ("ssm_state_indices", torch.zeros(2, 0, dtype=torch.int32), ArgumentValueError),
        ("num_accepted_tokens", torch.ones(3, dtype=torch.int32), ArgumentValueError),
        ("num_accepted_tokens", torch.ones(2, 1, dtype=torch.int32), ArgumentValueError),
        ("num_accepted_tokens", torch.ones(2), ArgumentTypeError),
        ("num_accepted_tokens", [1, 1], ArgumentTypeError),
        ("cu_seqlens", [0, 2, 4], ArgumentTypeError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int64), ArgumentValueError),
    ],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_vllm_errors_name_the_callers_argument(name, value, error, steps):
    made = vllm_case((steps,) * 2, [[3, 4], [8, 1]] if steps == 2 else [3, 8])
    raised = refused(vllm.fused_sigmoid_gating_delta_rule_update, made, **{name: value})
    assert (type(raised), raised.argument) == (error, name)


def test_vllm_refuses_gradients_through_the_states_of_many_tokens():
    made = vllm_case((2, 2), [[3, 4], [8, 1]])
    made["q"].requires_grad_()
    raised = refused(vllm.fused_sigmoid_gating_delta_rule_update, made)
    assert raised.argument == "ssm_state_indices"
    with torch.no_grad():
        vllm_judged(made, (2, 2))


def test_vllm_reads_nothing_of_the_tokens_states_on_the_host():
    """What the host reads cannot be traced: a graph of one piece has nothing of it."""
    made = vllm_case((2, 2), [[3, 4], [-1, 1]], accepted=(2, 1), varlen=False)
    pool = made.pop("initial_state")
    expected = vllm.fused_sigmoid_gating_delta_rule_update(**made, initial_state=pool.clone())
    whole = torch.compile(vllm.fused_sigmoid_gating_delta_rule_update, fullgraph=True, backend="eager")
    for one, other in zip(whole(**made, initial_state=pool), expected, strict=True):
        assert torch.equal(one, other)


# ---- FlashInfer


def flashinfer_case(length=1, slots=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(length)
    n, (h, hv, k, v) = 3, (2, 6, 8, 12)
    made = {
        "q": torch.randn(n, length, h, k, generator=g),
        "k": torch.randn(n, length, h, k, generator=g),
        "v": torch.randn(n, length, hv, v, generator=g),
        "A_log": torch.randn(hv, generator=g),
        "a": torch.randn(n, length, hv, generator=g),
        "dt_bias": torch.randn(hv, generator=g),
        "b": torch.randn(n, length, hv, generator=g),
    }
    pool = torch.randn(n if slots is None else 9, hv, v, k, generator=g).to(dtype)
    states = {"state": pool} if slots is None else {"state": None, "initial_state": pool, **slots}
    read = torch.arange(n) if slots is None else slots["initial_state_indices"]
    call = canonical_call(
        made["A_log"], made["a"], made["dt_bias"], 1.0, 20.0, made["q"], made["k"], made["v"], made["b"],
        pool.clone(), read, None, True, state_layout="vk",
        output_state_indices=(slots or {}).get("output_state_indices"),
    )  # fmt: skip
    return {**made, **states}, call


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flashinfer_decode_updates_states_in_batch_order(length, dtype):
    made, call = flashinfer_case(length, dtype=dtype)
    truth = reference(call, chunk=64)
    o, state = flashinfer.gated_delta_rule_decode_pretranspose(**made)
    assert state is made["state"]
    call.pool.copy_(state)
    judged(call, o, truth)


def test_flashinfer_decode_from_a_pool_gives_zeros_where_there_is_no_slot():
    indices = {"initial_state_indices": torch.tensor([5, -1, 2]), "output_state_indices": torch.tensor([5, -1, 7])}
    made, call = flashinfer_case(1, indices)
    truth, before = reference(call), made["initial_state"].clone()
    output = torch.full((3, 1, 6, 12), 9.0)
    o, pool = flashinfer.gated_delta_rule_decode_pretranspose(**made, output=output)
    assert o.data_ptr() == output.data_ptr()
    assert bool((o[1] == 0).all())
    call.pool.copy_(pool)
    filled = o.clone()
    filled[1] = truth.o[1].view(1, 6, 12)
    judged(call, filled, truth)
    assert all(torch.equal(pool[i], before[i]) for i in range(9) if i not in (5, 7))
    wide = torch.empty(3, 1, 6, 12, dtype=torch.float64)
    made["initial_state"].copy_(before)
    assert flashinfer.gated_delta_rule_decode_pretranspose(**made, output=wide)[0] is wide
    assert torch.equal(wide.float(), output)


def test_flashinfer_decode_keeps_intermediate_states():
    made, _ = flashinfer_case(4)
    buffer, before = torch.zeros(3, 4, 6, 12, 8), made["state"].clone()
    o, _ = flashinfer.gated_delta_rule_decode_pretranspose(
        **made, intermediate_states_buffer=buffer, disable_state_update=True
    )
    assert torch.equal(made["state"], before)
    again, state = flashinfer.gated_delta_rule_decode_pretranspose(**made)
    assert torch.allclose(buffer[:, -1], state, atol=1e-5)
    assert torch.allclose(o, again, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_flashinfer_decode_refuses_a_buffer_with_fewer_rows_than_sequences(rows):
    made, _ = flashinfer_case(4)
    memory = torch.full((5, 4, 6, 12, 8), 7.0)
    raised = refused(flashinfer.gated_delta_rule_decode_pretranspose, made, intermediate_states_buffer=memory[:rows])
    assert (raised.argument, raised.given) == ("intermediate_states_buffer", str(rows))
    assert bool((memory == 7).all()), "what lies behind the buffer is somebody else's"
    flashinfer.gated_delta_rule_decode_pretranspose(**made, intermediate_states_buffer=memory)
    assert bool((memory[3:] == 7).all()), "more rows than sequences are welcome"


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_flashinfer_decode_writes_nothing_for_padding(length, kind):
    """Slot -1 to read marks an entry as padding, whatever slot it names to write."""
    indices = {"initial_state_indices": [-1, 5, -1], "output_state_indices": [7, 2, -1]}
    indices = {name: torch.tensor(slots, dtype=kind) for name, slots in indices.items()}
    made, _ = flashinfer_case(length, indices)
    before, buffer = made["initial_state"].clone(), torch.full((3, 4, 6, 12, 8), 7.0)
    o, pool = flashinfer.gated_delta_rule_decode_pretranspose(**made, intermediate_states_buffer=buffer)
    assert [i for i in range(9) if not torch.equal(pool[i], before[i])] == [2]
    assert bool((o[0] == 0).all() and (o[2] == 0).all() and (o[1] != 0).any())
    assert bool((buffer[0] == 7).all() and (buffer[2] == 7).all())
    assert torch.equal(buffer[1, length - 1], pool[2])
    assert indices["output_state_indices"].tolist() == [7, 2, -1], "the caller's table is the caller's"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("backend", "flashinfer", ArgumentValueError),
        ("backend", "rubin", ArgumentValueError),
        ("use_qk_l2norm", 1, ArgumentTypeError),
        ("q", None, ArgumentTypeError),
        ("scale", 0.0, ArgumentValueError),
        ("initial_state", torch.zeros(9, 6, 12, 9), ArgumentValueError),
        ("initial_state_indices", None, ArgumentTypeError),
        ("initial_state_indices", torch.tensor([1, 2]), ArgumentValueError),
        ("initial_state_indices", torch.tensor([1.0, 2.0, 3.0]), ArgumentTypeError),
        ("output_state_indices", torch.tensor([[1], [2], [3]]), ArgumentValueError),
        ("output_state_indices", [1, 2, 3], ArgumentTypeError),
        ("intermediate_states_buffer", torch.zeros(3), ArgumentValueError),
        ("output", torch.zeros(3, 1, 6, 13), ArgumentValueError),
        ("output", torch.zeros(3, 1, 6, 1, dtype=torch.float64), ArgumentValueError),
        ("output", torch.zeros(1, dtype=torch.float64).expand(3, 1, 6, 12), ArgumentValueError),
        ("output", torch.zeros(3, 1, 6, 12, dtype=torch.int32), ArgumentTypeError),
    ],
)
def test_flashinfer_decode_errors_name_the_callers_argument(name, value, error):
    made, _ = flashinfer_case(1, {"initial_state_indices": torch.tensor([5, -1, 2])})
    raised = refused(flashinfer.gated_delta_rule_decode_pretranspose, made, **{name: value})
    assert (type(raised), raised.argument) == (error, name)


def test_flashinfer_decode_names_the_state_that_was_given():
    made, _ = flashinfer_case(1)
    raised = refused(flashinfer.gated_delta_rule_decode_pretranspose, made, state=torch.zeros(3, 6, 12, 9))
    assert (raised.argument, raised.given) == ("state", "shape [3, 6, 12, 9]")


def test_flashinfer_leaves_the_kernel_to_the_registry():
    made, _ = flashinfer_case(1)
    for backend in ("auto", None):
        flashinfer.gated_delta_rule_decode_pretranspose(**made, backend=backend)
        flashinfer.chunk_gated_delta_rule(**prefill_case(), backend=backend, use_cp=backend)


def test_flashinfer_prefill():
    packed = fla_case(False)
    call = exact(packed)
    truth = reference(call, chunk=64)
    made = {name: packed[name][0] for name in ("q", "k", "v", "beta")}
    # The decay itself, to float32: its rounding is no part of the bound, so it is what the reference starts from.
    made["g"] = packed["g"][0].exp()
    call.a = raw_decay(made["g"].double().log()).unsqueeze(0)
    truth = reference(call, chunk=64)
    state = packed["initial_state"].transpose(-1, -2).contiguous()
    options = {"cu_seqlens": packed["cu_seqlens"], "use_qk_l2norm_in_kernel": True, "initial_state": state}
    output, final = torch.empty(15, 6, 12), torch.empty(4, 6, 12, 8)
    o, got = flashinfer.chunk_gated_delta_rule(
        **made, **options, output_final_state=True, output=output, output_state=final, scale=0.0
    )
    assert o is output
    assert got is final
    call.pool.copy_(got.transpose(-1, -2))
    judged(call, o.unsqueeze(0), truth)
    assert torch.equal(flashinfer.chunk_gated_delta_rule(**made, **options), o)


def prefill_case():
    packed = fla_case(False)
    made = {name: packed[name][0] for name in ("q", "k", "v", "beta")}
    return {**made, "g": packed["g"][0].exp(), "cu_seqlens": packed["cu_seqlens"], "use_qk_l2norm_in_kernel": True}


def prefilled(initial):
    """Outputs and final states in float32 of sequences that start from ``initial``."""
    return flashinfer.chunk_gated_delta_rule(**prefill_case(), initial_state=initial, output_final_state=True)


SLOTS = [6, 0, 3, 8]  # of the four sequences, the second of which is empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_flashinfer_prefill_reads_and_writes_the_slots_of_a_pool(dtype, kind):
    pool = torch.randn(9, 6, 12, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    before, numbers = pool.clone(), torch.tensor(SLOTS, dtype=kind)
    expected, final = prefilled(before[SLOTS])
    made = {**prefill_case(), "initial_state": pool, "state_indices": numbers}
    assert torch.equal(flashinfer.chunk_gated_delta_rule(**made), expected)
    assert torch.equal(pool, before), "no final states were asked for"

    apart = torch.full_like(pool, 7)
    o, same = flashinfer.chunk_gated_delta_rule(**made, output_final_state=True, output_state=apart)
    assert same is apart
    assert torch.equal(pool, before)
    assert torch.equal(o, expected)
    assert torch.equal(apart[SLOTS], final.to(dtype))
    others = [i for i in range(9) if i not in SLOTS]
    assert bool((apart[others] == 7).all())

    o, same = flashinfer.chunk_gated_delta_rule(**made, output_final_state=True, output_state=pool)
    assert same is pool
    assert torch.equal(o, expected)
    assert torch.equal(pool[SLOTS], apart[SLOTS])
    assert torch.equal(pool[others], before[others])


def test_flashinfer_prefill_starts_from_zero_without_a_slot_or_a_state():
    pool = torch.randn(9, 6, 12, 8, generator=torch.Generator().manual_seed(5))
    start = pool[SLOTS]
    start[2] = 0
    expected, final = prefilled(start)
    made = {**prefill_case(), "output_final_state": True, "state_indices": torch.tensor([6, 0, -1, 8])}
    apart = torch.full_like(pool, 7)
    o, _ = flashinfer.chunk_gated_delta_rule(**made, initial_state=pool, output_state=apart)
    assert torch.equal(o, expected)
    assert torch.equal(apart[[6, 0, 8]], final[[0, 1, 3]])
    assert bool((apart[[1, 2, 3, 4, 5, 7]] == 7).all()), "nothing is stored for a sequence without a slot"
    expected, final = prefilled(torch.zeros(4, 6, 12, 8))
    o, _ = flashinfer.chunk_gated_delta_rule(**made, output_state=apart)
    assert torch.equal(o, expected)
    assert torch.equal(apart[[6, 0, 8]], final[[0, 1, 3]])
    assert bool((apart[[1, 2, 3, 4, 5, 7]] == 7).all())


def test_flashinfer_prefill_rounds_to_the_output_states_dtype_at_the_end_alone():
    initial = torch.randn(4, 6, 12, 8, generator=torch.Generator().manual_seed(5))
    expected, final = prefilled(initial)
    narrow = torch.empty(4, 6, 12, 8, dtype=torch.bfloat16)
    o, _ = flashinfer.chunk_gated_delta_rule(
        **prefill_case(), initial_state=initial, output_final_state=True, output_state=narrow
    )
    assert torch.equal(o, expected)
    assert torch.equal(narrow, final.to(torch.bfloat16))


STATES = {"initial_state": torch.ones(4, 6, 12, 8), "output_final_state": True}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("use_cp", True, ArgumentValueError),
        ("use_cp", False, ArgumentValueError),
        ("backend", "cudnn", ArgumentValueError),
        ("_cp_chunk_len", 64, ArgumentValueError),
        ("max_seqlen", 16, ArgumentValueError),
        ("max_seqlen", 3, ArgumentValueError),
        ("max_seqlen", 9.0, ArgumentTypeError),
        ("cu_seqlens", [0, 5, 5, 6, 15], ArgumentTypeError),
        ("cu_seqlens", torch.tensor([0, 5, 4, 6, 15]), ArgumentValueError),
        ("q", torch.zeros(1, 15, 2, 8), ArgumentValueError),
        ("k", torch.zeros(15, 2, 8, dtype=torch.float64), ArgumentTypeError),
        ("v", torch.zeros(15, 1, 12), ArgumentValueError),
        ("g", torch.ones(15, 1), ArgumentValueError),
        ("g", [1.0], ArgumentTypeError),
        ("beta", torch.ones(14, 6), ArgumentValueError),
        ("scale", -1.0, ArgumentValueError),
        ("initial_state", torch.zeros(4, 6, 8, 12), ArgumentValueError),
        ("initial_state", torch.zeros(4, 6, 12, 8, dtype=torch.int32), ArgumentTypeError),
        ("output_state", torch.zeros(5, 6, 12, 8), ArgumentValueError),
        ("output_state", torch.zeros(1).expand(4, 6, 12, 8), ArgumentValueError),
        ("output", torch.zeros(15, 6, 13), ArgumentValueError),
        ("output", torch.zeros(15, 6, 12, dtype=torch.float64), ArgumentTypeError),
        ("state_indices", torch.tensor([1, 2, 3]), ArgumentValueError),
        ("state_indices", torch.tensor([0.0, 1.0, 2.0, 3.0]), ArgumentTypeError),
        ("output_final_state", False, ArgumentValueError),
    ],
)
def test_flashinfer_prefill_errors_name_the_callers_argument(name, value, error):
    """Also where only the op can tell, and before the states that were given are written."""
    made = {**prefill_case(), **STATES, "output_state": torch.full((4, 6, 12, 8), 7.0)}
    raised = refused(flashinfer.chunk_gated_delta_rule, made, **{name: value})
    assert (type(raised), raised.argument) == (error, "output_state" if name == "output_final_state" else name)


def test_flashinfer_prefill_with_slots_wants_pools():
    made = {**prefill_case(), "state_indices": torch.tensor(SLOTS)}
    assert refused(flashinfer.chunk_gated_delta_rule, made).argument == "state_indices"
    pooled = {**made, "initial_state": torch.zeros(9, 6, 12, 8)}
    assert refused(flashinfer.chunk_gated_delta_rule, pooled, output_final_state=True).argument == "output_state"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_every_n_tokens", 64),
        ("state_checkpoints", torch.zeros(1)),
        ("output_state", torch.zeros(4, 6, 12, 8)),
        ("initial_state", torch.zeros(3, 6, 12, 8)),
        ("cu_seqlens", None),
    ],
)
def test_flashinfer_prefill_refuses_what_it_would_have_to_ignore(name, value):
    packed = fla_case(False)
    made = {key: packed[key][0] for key in ("q", "k", "v", "g", "beta")}
    made["g"] = made["g"].exp()
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=f"^{name}:"):
        flashinfer.chunk_gated_delta_rule(**{**made, "cu_seqlens": packed["cu_seqlens"], name: value})


def test_flashinfer_decode_refuses_two_kinds_of_states():
    made, _ = flashinfer_case(1)
    with pytest.raises(ArgumentTypeError, match=r"^state:"):
        flashinfer.gated_delta_rule_decode_pretranspose(**{**made, "state": None})
    with pytest.raises(ArgumentValueError, match=r"^initial_state_indices:"):
        flashinfer.gated_delta_rule_decode_pretranspose(**made, initial_state_indices=torch.arange(3))
