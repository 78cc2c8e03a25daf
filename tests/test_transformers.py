"""Models of transformers on isokern: the same logits, states and tokens as the stock path, and nothing left behind."""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from transformers import PreTrainedModel, cache_utils
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers.models.glm5_next import modeling_glm5_next
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen4_exp import modeling_qwen4_exp

from isokern import registry
from isokern.errors import IntegrationError, UnknownNameError
from isokern.integrations import transformers as integration
from isokern.integrations.slots import slots
from isokern.integrations.transformers import disable, enable
from isokern.integrations.transformers import forward as forward_module
from isokern.integrations.transformers.families import FAMILIES
from isokern.integrations.transformers.packed import packed_conv
from isokern.integrations.transformers.stock import KNOWN, check_version
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.tools.transformers_suite import pytest_configure

SHARED = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Large enough for the layers to matter in the logits.
    "initializer_range": 0.3,
}
# K != V, three value heads to a key head.
GDN = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
KDA = {
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

MODELS = {
    "qwen3_next": (modeling_qwen3_next, "Qwen3NextForCausalLM", {**GDN, **MOE, "head_dim": 16}),
    "qwen3_5": (modeling_qwen3_5, "Qwen3_5ForCausalLM", {**GDN, "head_dim": 16}),
    "qwen3_5_moe": (modeling_qwen3_5_moe, "Qwen3_5MoeForCausalLM", {**GDN, **MOE, "head_dim": 16}),
    "olmo_hybrid": (modeling_olmo_hybrid, "OlmoHybridForCausalLM", GDN),
    "kimi_linear": (modeling_kimi_linear, "KimiLinearForCausalLM", KDA),
}
# The rest are tested layer by layer: their models need more than a small config.
LAYERS = {
    "qwen4_exp": (modeling_qwen4_exp, "Qwen4ExpTextGatedDeltaNet", "Qwen4ExpTextConfig", GDN),
    "glm5_next": (
        modeling_glm5_next,
        "Glm5NextTextLinearAttention",
        "Glm5NextTextConfig",
        {**KDA, "qk_rope_head_dim": 0},
    ),
    "bailing_hybrid": (modeling_bailing_hybrid, "BailingHybridDeltaAttention", "BailingHybridConfig", {"head_dim": 8}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def _made(name):
    module, cls, extra = MODELS[name]
    cls = getattr(module, cls)
    torch.manual_seed(1)
    model = cls(cls.config_class(**SHARED, **extra)).eval()
    _draw_gates(model)
    return model


def _draw_gates(module):
    """The constructors leave some of these empty, and others all alike."""
    g = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = torch.randn(parameter.shape, generator=g)


@pytest.fixture(params=MODELS)
def model(request):
    return copy.deepcopy(_made(request.param))


@pytest.fixture
def qwen():
    return copy.deepcopy(_made("qwen3_next"))


def tokens(batch, length, seed=0):
    return torch.randint(1, SHARED["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def states(kept):
    found = []
    for layer in kept.layers:
        if isinstance(layer, cache_utils.LinearAttentionLayer):
            found += [layer.conv_states[0].clone(), layer.recurrent_states[0].clone()]
    return found


@torch.no_grad()
def run(model, ids, *, cuts=(), **kwargs):
    """Logits of ``ids`` given in pieces that end at ``cuts``, one cache going along, and what the cache then holds."""
    kept, logits = cache_utils.DynamicCache(config=model.config), []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        more = {key: value[:, :end] for key, value in kwargs.items()}
        logits.append(model(ids[:, start:end], past_key_values=kept, **more).logits)
    return [torch.cat(logits, dim=1), *states(kept)]


class InFloat64:
    """The stock model in float64: transformers' functions turn everything to float32, so they get another torch."""

    def __init__(self, name):
        self.module = MODELS[name][0]

    def __enter__(self):
        module = self.module
        self.torch, self.float = module.torch, torch.Tensor.float

        class Torch:
            float32 = torch.float64

            def __getattr__(self, name):
                return getattr(torch, name)

        module.torch = Torch()
        torch.Tensor.float = torch.Tensor.double

    def __exit__(self, *exc):
        self.module.torch, torch.Tensor.float = self.torch, self.float


def exact_run(name, ids, **kwargs):
    exact = copy.deepcopy(_made(name)).double()
    exact.config._experts_implementation = "eager"  # the grouped products know no float64
    with InFloat64(name):
        return run(exact, ids, **kwargs)


def far(got, exact):
    """Largest error against the float64 run, in units of float32 rounding of the largest value."""
    got, exact = got.detach(), exact.detach()
    return float((got.double() - exact.double()).abs().max() / (exact.abs().max() * 2**-24))


def assert_as_good(got, stock, exact):
    """The bound: both paths round float32 arithmetic of one formula, summed in different orders. The stock path's own
    distance from the float64 run says what that comes to after four layers; isokern's may be four times that, and where
    the stock path happens to be nearly exact, 64 units.
    """
    assert len(got) == len(stock) == len(exact)
    for mine, theirs, truth in zip(got, stock, exact, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        assert far(mine, truth) <= max(4 * far(theirs, truth), 64)


PLANS = {
    "prefill": {"length": 70},
    "decode": {"length": 12, "cuts": (8, 9, 10, 11)},
    "chunks": {"length": 40, "cuts": (7, 23, 24)},
    "one token": {"length": 3, "cuts": (1, 2)},
}


@pytest.mark.parametrize("plan", PLANS)
def test_logits_and_caches_equal_the_stock_path(model, plan):
    name = model.config.model_type.removesuffix("_text")
    plan = dict(PLANS[plan])
    ids = tokens(2, plan.pop("length"))
    stock, exact = run(model, ids, **plan), exact_run(name, ids, **plan)
    assert len(enable(model)) == 3
    got = run(model, ids, **plan)
    assert not all(torch.equal(a, b) for a, b in zip(got, stock, strict=True)), "isokern did not run"
    assert_as_good(got, stock, exact)


def test_left_padding_changes_nothing_for_the_tokens_there_are(model):
    name = model.config.model_type.removesuffix("_text")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    call = partial(run, ids=ids, cuts=(9, 10), attention_mask=mask)
    stock, exact = call(model), exact_run(name, ids, cuts=(9, 10), attention_mask=mask)
    enable(model)
    got = call(model)
    seen = mask.bool()
    assert_as_good([got[0][seen], *got[1:]], [stock[0][seen], *stock[1:]], [exact[0][seen], *exact[1:]])


def test_generate_gives_the_same_tokens(model):
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    generate = partial(model.generate, ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    expected = generate()
    enable(model)
    assert torch.equal(generate(), expected)
    if model.config.model_type == "qwen3_next":
        assert torch.equal(generate(num_beams=2), disable(model) and generate(num_beams=2)), "states follow their beams"


def test_the_cache_keeps_its_tensors(qwen):
    enable(qwen)
    kept = cache_utils.DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(tokens(2, 5), past_key_values=kept)
        before = [layer.recurrent_states[0].data_ptr() for layer in kept.layers if hasattr(layer, "recurrent_states")]
        qwen(tokens(2, 1), past_key_values=kept)
    after = [layer.recurrent_states[0].data_ptr() for layer in kept.layers if hasattr(layer, "recurrent_states")]
    assert before == after
    assert all(s.is_contiguous() for s in states(kept)[1::2])


def test_a_cache_that_was_reset_starts_from_zero(qwen):
    enable(qwen)
    kept, ids = cache_utils.DynamicCache(config=qwen.config), tokens(1, 6)
    with torch.no_grad():
        expected = qwen(ids, past_key_values=kept).logits
        kept.reset()
        for layer in kept.layers:
            if isinstance(layer, cache_utils.LinearAttentionLayer):
                layer.recurrent_states[0].fill_(7.0)  # not its business any more
        kept.layers[1] = cache_utils.DynamicCache(config=qwen.config).layers[1]
        assert torch.equal(qwen(ids, past_key_values=kept).logits, expected)


def test_a_cache_that_records_the_past_keeps_every_input_of_the_convolution():
    """As assisted decoding wants it, to go back."""
    layer, x = layer_of("qwen3_5"), torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(3))
    stock, mine = one_layer_cache(2, layer, 7), one_layer_cache(2, layer, 7)
    for kept in (stock, mine):
        kept.activate_past_recording()
    with torch.no_grad():
        expected = layer(x, stock)
        enable(layer)
        assert far(layer(x, mine), expected) <= 64
    inputs = mine.layers[0].conv_states[0]
    assert inputs.shape[-1] == layer.conv_kernel_size + 1
    assert torch.equal(inputs, stock.layers[0].conv_states[0])


def test_a_static_cache_is_served(qwen):
    enable(qwen)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = qwen(ids).logits
        kept = cache_utils.StaticCache(config=qwen.config, max_cache_len=16)
        got = [qwen(ids[:, :7], past_key_values=kept).logits]
        got += [qwen(ids[:, i : i + 1], past_key_values=kept).logits for i in (7, 8)]
    assert torch.allclose(torch.cat(got, 1), expected, atol=1e-5)


# ---- one layer, under the op's own error bound


def layer_of(name):
    if name in MODELS:
        found = copy.deepcopy(_made(name))
        return next(m for m in found.modules() if type(m).__name__ == family(name).layer)
    module, cls, config, extra = LAYERS[name]
    shared = {key: value for key, value in SHARED.items() if key != "layer_types"}
    if name == "bailing_hybrid":
        shared["num_attention_heads"] = 3
    made = getattr(module, config)(**{**shared, **extra})
    torch.manual_seed(3)
    layer = getattr(module, cls)(made, 0).eval()
    _draw_gates(layer)
    return layer


def family(name):
    return next(f for f in FAMILIES if f.module == name)


def raw_gates(layer, x):
    """a, b, A_log, dt_bias and the gate's kind, written out from each layer's formula."""
    kind = type(layer).__name__
    if kind == "Qwen3NextGatedDeltaNet":
        ba = layer.in_proj_ba(x).unflatten(-1, (layer.num_k_heads, 2, layer.num_v_heads // layer.num_k_heads))
        return ba[..., 1, :].flatten(2), ba[..., 0, :].flatten(2), layer.A_log, layer.dt_bias, {}
    if kind == "OlmoHybridGatedDeltaNet":
        return layer.a_proj(x), layer.b_proj(x), layer.A_log, layer.dt_bias, {"allow_neg_eigval": True}
    if hasattr(layer, "in_proj_a"):
        return layer.in_proj_a(x), layer.in_proj_b(x), layer.A_log, layer.dt_bias, {}
    gate = layer.forget_gate
    a = gate.f_proj(x) if hasattr(gate, "f_proj") else gate.f_b_proj(gate.f_a_proj(x))
    bound = {} if kind == "KimiLinearDeltaAttention" else {"lower_bound": -5.0}
    return a, layer.b_proj(x), gate.A_log.view(-1), gate.dt_bias, {"is_kda": True, **bound}


def rule_inputs(name, layer, x, kept, monkeypatch):
    """What the stock layer hands its delta rule, and the state it starts from."""
    seen = {}

    def record(query, key, value, **kwargs):
        seen.update(q=query, k=key, v=value, **kwargs)
        shape = (value.shape[0], value.shape[2], key.shape[-1], value.shape[-1])
        return torch.zeros_like(value), torch.zeros(shape)

    module = (MODELS.get(name) or LAYERS[name])[0]
    kda = hasattr(module, "chunk_kimi_delta_attention")
    names = ("kimi_delta_attention", "kimi_delta_attention") if kda else ("gated_delta_rule", "gated_delta_rule")
    with monkeypatch.context() as patch:
        patch.setattr(module, ("chunk_" if kda else "torch_chunk_") + names[0], record)
        patch.setattr(module, ("recurrent_" if kda else "torch_recurrent_") + names[1], record)
        layer(x, kept)
    return seen


def one_layer_cache(batch, layer, seed, state=None):
    """A cache of one linear-attention layer, as if it had seen something."""
    kept = cache_utils.Cache(layers=[cache_utils.LinearAttentionLayer()])
    layer.layer_idx = 0
    g = torch.Generator().manual_seed(seed)
    channels, width = layer.conv1d.weight.shape[0], layer.conv_kernel_size
    before = torch.randn(batch, channels, width, generator=g).to(layer.conv1d.weight.dtype)
    kept.update_conv_state(before, 0, conv_kernel_size=width)
    h = family_heads(layer)
    kept.update_recurrent_state(torch.randn(batch, h.hv, h.k, h.v, generator=g), 0)
    return kept


def family_heads(layer):
    return next(f for f in FAMILIES if f.layer == type(layer).__name__).heads(layer)


def judged(name, length, monkeypatch, fault=None, dtype=torch.float32):
    """The faults of one call of the layer, its delta rule judged by the op's own bound on the stock layer's inputs."""
    layer = layer_of(name).to(dtype)
    x = torch.randn(3, length, SHARED["hidden_size"], generator=torch.Generator().manual_seed(length)).to(dtype)
    with torch.no_grad():
        seen = rule_inputs(name, layer, x, one_layer_cache(3, layer, 5), monkeypatch)
        a, b, A_log, dt_bias, kind = raw_gates(layer, x)
        start = one_layer_cache(3, layer, 5)
        shared = (A_log, a, dt_bias, 1.0, 20.0, seen["q"], seen["k"], seen["v"], b)
        pool = start.layers[0].recurrent_states[0]
        call = canonical_call(*shared, pool, torch.arange(3), None, True, **kind)
        truth = reference(call, chunk=64)
        out = []
        enable(layer)
        finish = family(name).finish
        listening = replace(family(name), finish=lambda layer, o, z: (out.append(o), finish(layer, o, z))[1])
        layer.forward = replace(layer.forward, family=listening)
        if fault is not None:
            fault(monkeypatch)
        layer(x, start)
        return judge(call, out[0], truth).faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("name", [f.module for f in FAMILIES])
def test_each_layer_is_within_the_ops_error_bound(name, length, dtype, monkeypatch):
    assert judged(name, length, monkeypatch, dtype=dtype) == ()


def swapped_slots(patch):
    patch.setattr(forward_module, "slots", lambda n, device: torch.arange(n, dtype=torch.int32).flip(0))


def no_pool(patch):
    patch.setattr(forward_module.LayerStates, "pool", lambda self, shape, device: torch.zeros(shape))


def altered(change):
    op = registry.get("fused_sigmoid_gating")

    def plant(patch):
        patch.setattr(forward_module.registry, "get", lambda name: lambda *a, **k: op(*change(list(a)), **k))

    return plant


def no_scale(args):
    args[11] = 1.0
    return args


def no_norm(args):
    args[12] = False
    return args


def exchanged_gates(args):
    args[1], args[8] = args[8], args[1]
    return args


FAULTS = {
    "swapped slots": swapped_slots,
    "no pool": no_pool,
    "no scale": altered(no_scale),
    "no L2 norm": altered(no_norm),
    "a and b exchanged": altered(exchanged_gates),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    assert judged("qwen3_next", 5, monkeypatch, FAULTS[fault])


# ---- packed batches


PACKED = {"cu_seq_lens_q": torch.tensor([0, 5, 6, 14], dtype=torch.int32), "max_length_q": 8}


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "olmo_hybrid"])
def test_packed_sequences_are_as_each_alone(name):
    layer = layer_of(name)
    x = torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(9))
    enable(layer)
    alone = torch.cat([layer(part) for part in x.split([5, 1, 8], dim=1)], dim=1)
    assert far(layer(x, **PACKED), alone) <= 64
    assert not torch.allclose(layer(x), alone, atol=1e-3), "the sequences do matter to each other unless kept apart"


def test_gradients_of_a_packed_batch_are_those_of_its_sequences():
    layer, x = layer_of("qwen3_5"), torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(9))
    enable(layer)
    weights = torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(10))
    parameters = list(layer.parameters())
    packed = torch.autograd.grad((layer(x, **PACKED) * weights).sum(), parameters)
    alone = torch.cat([layer(part) for part in x.split([5, 1, 8], dim=1)], dim=1)
    single = torch.autograd.grad((alone * weights).sum(), parameters)
    for mine, expected in zip(packed, single, strict=True):
        assert torch.allclose(mine, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7)


def test_a_packed_prompt_fills_a_new_cache_with_one_state_per_sequence():
    layer, x = layer_of("qwen3_5"), torch.randn(1, 14, 32, generator=torch.Generator().manual_seed(9))
    enable(layer)
    kept = cache_utils.Cache(layers=[cache_utils.LinearAttentionLayer()])
    with torch.no_grad():
        layer(x, kept, **PACKED)
        for n, part in enumerate(x.split([5, 1, 8], dim=1)):
            alone = cache_utils.Cache(layers=[cache_utils.LinearAttentionLayer()])
            layer(part, alone)
            got, expected = kept.layers[0].recurrent_states[0][n], alone.layers[0].recurrent_states[0][0]
            assert torch.allclose(got, expected, atol=1e-6)
        with pytest.raises(IntegrationError, match="continues from a cache"):
            layer(x, kept, **PACKED)
        with pytest.raises(IntegrationError, match="states of 3 sequences"):
            layer(x[:, :1], kept)
    with pytest.raises(IntegrationError, match="with a cache and gradients"):
        layer(x, kept, **PACKED)


def test_packed_marks_that_do_not_say_where_sequences_start_are_refused():
    layer = layer_of("qwen3_5")
    enable(layer)
    with pytest.raises(IntegrationError, match="seq_idx without cu_seq_lens_q"):
        layer(torch.zeros(1, 4, 32), seq_idx=torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(IntegrationError, match="batch of 2 rows"):
        layer(torch.zeros(2, 4, 32), cu_seq_lens_q=torch.tensor([0, 4]))


def test_the_packed_convolution_is_the_stock_one_of_each_sequence():
    g = torch.Generator().manual_seed(3)
    x, weight, bias = torch.randn(1, 5, 13, generator=g), torch.randn(5, 4, generator=g), torch.randn(5, generator=g)
    lengths = (1, 0, 7, 2, 3)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    stock = modeling_qwen3_5.causal_conv1d_fn
    alone = [stock(part, weight, bias, activation="silu") for part in x.split(lengths, -1) if part.shape[-1]]
    assert torch.allclose(packed_conv(x, offsets, weight, bias, "silu"), torch.cat(alone, -1), atol=1e-6)


# ---- graphs


def test_a_step_is_one_graph_for_torch_compile(qwen):
    """No break and nothing read on the host, which is what CUDA graphs need too."""
    layer = qwen.model.layers[0].linear_attn
    enable(layer)
    x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        eager, traced = one_layer_cache(2, layer, 6), one_layer_cache(2, layer, 6)
        for _ in range(3):
            assert torch.equal(compiled(x, traced), layer(x, eager))
        assert all(torch.equal(a, b) for a, b in zip(states(traced), states(eager), strict=True))
        assert not torch.equal(states(traced)[1], states(one_layer_cache(2, layer, 6))[1])


def test_the_slots_of_a_batch_are_made_once():
    assert slots(3, torch.device("cpu")) is slots(3, torch.device("cpu"))
    assert slots(3, torch.device("cpu")).tolist() == [0, 1, 2]


# ---- gradients


def test_training_without_a_cache_gets_the_stock_gradients(qwen):
    ids = tokens(2, 9)

    def gradients():
        qwen.zero_grad()
        qwen(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in qwen.named_parameters() if p.grad is not None}

    expected = gradients()
    enable(qwen)
    got = gradients()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=1e-3 * float(value.abs().max()) + 1e-7), name


def test_gradients_through_a_cache_take_the_stock_path(qwen):
    enable(qwen)
    kept = cache_utils.DynamicCache(config=qwen.config)
    qwen(tokens(1, 5), past_key_values=kept)
    assert kept.layers[0].recurrent_states[0].requires_grad


# ---- turning it on and off


def test_disable_restores_the_same_bits_and_leaves_nothing_behind(model):
    ids = tokens(2, 11)
    before = run(model, ids, cuts=(9, 10))
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    names = enable(model)
    assert disable(model) == names
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for mine, expected in zip(run(model, ids, cuts=(9, 10)), before, strict=True):
        assert torch.equal(mine, expected)
    assert disable(model) == ()


def test_enabling_twice_is_enabling_once_and_takes_the_new_backend(qwen):
    names = enable(qwen)
    assert enable(qwen, backend="torch_reference") == names
    assert qwen.model.layers[0].linear_attn.forward.backend == "torch_reference"
    assert disable(qwen) == names
    assert "forward" not in vars(qwen.model.layers[0].linear_attn)


def test_parts_of_models_and_several_models_do_not_see_each_other(qwen):
    other = copy.deepcopy(qwen)
    assert enable(qwen.model.layers[0]) == ("linear_attn",)
    assert enable(qwen.model.layers[2].linear_attn) == ("",)
    assert "forward" not in vars(qwen.model.layers[3].linear_attn)
    assert disable(other) == ()
    assert len(disable(qwen)) == 2


def test_copies_and_pickles_run_on_their_own_parameters(qwen):
    enable(qwen)
    buffer = io.BytesIO()
    torch.save(qwen, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(qwen), torch.load(buffer, weights_only=False)):
        layer = other.model.layers[0].linear_attn
        assert layer.forward.layer is layer
        assert len(disable(other)) == 3


def test_a_forced_backend_is_the_one_that_runs(qwen, monkeypatch):
    asked = []
    op = registry.get("fused_sigmoid_gating")
    monkeypatch.setattr(
        forward_module.registry, "get", lambda name: lambda *a, **k: (asked.append(k["backend"]), op(*a, **k))[1]
    )
    enable(qwen, backend="torch_vectorized")
    with torch.no_grad():
        qwen(tokens(1, 3))
    assert asked == ["torch_vectorized"] * 3


# ---- bad input


class Deeper(modeling_qwen3_next.Qwen3NextGatedDeltaNet):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) + 1


def test_a_model_without_such_layers_is_named(qwen):
    with pytest.raises(IntegrationError, match=r"found Qwen3NextAttention.*supported: .*Qwen3NextGatedDeltaNet") as e:
        enable(qwen.model.layers[1].self_attn)
    assert e.value.package == "transformers"


def test_an_unknown_backend_is_named(qwen):
    with pytest.raises(UnknownNameError, match="torch_chunkd"):
        enable(qwen, backend="torch_chunkd")


def test_one_unknown_layer_leaves_the_whole_model_as_it_was(qwen):
    qwen.model.layers[3].linear_attn.__class__ = Deeper
    with pytest.raises(IntegrationError, match=r"Qwen3NextGatedDeltaNet.forward: found another source.*Deeper"):
        enable(qwen)
    assert disable(qwen) == ()


def test_a_forward_that_something_else_replaced_is_left_alone(qwen):
    layer = qwen.model.layers[2].linear_attn
    layer.forward = layer.forward
    with pytest.raises(IntegrationError, match="replaced"):
        enable(qwen)
    assert disable(qwen) == ()


def test_a_missing_package_is_named(qwen, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_version.cache_clear()
    with pytest.raises(IntegrationError, match="version: found none installed, supported: transformers"):
        enable(qwen)
    check_version.cache_clear()


def test_the_packages_own_tests_would_run_on_isokern(monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "post_init", PreTrainedModel.post_init)  # so that it is put back
    monkeypatch.delenv("ISOKERN_SUITE_STOCK", raising=False)
    pytest_configure(None)
    module, cls, extra = MODELS["qwen3_5"]
    cls = getattr(module, cls)
    assert len(disable(cls(cls.config_class(**SHARED, **extra)))) == 3


@pytest.mark.parametrize("version", ["4.57.1", "5.20.2", "6.0.0"])
def test_another_version_is_named(qwen, version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    check_version.cache_clear()
    with pytest.raises(IntegrationError, match=f"version: found {version}, supported: transformers 5.21 or later 5.x"):
        enable(qwen)
    monkeypatch.undo()
    check_version.cache_clear()


def test_a_cache_that_keeps_states_in_its_own_way_is_refused_before_it_is_touched(qwen):
    class Copying(cache_utils.DynamicCache):
        def update_recurrent_state(self, *args, **kwargs):
            return super().update_recurrent_state(*args, **kwargs)

    enable(qwen)
    kept = Copying(config=qwen.config)
    with torch.no_grad(), pytest.raises(IntegrationError, match="found Copying with LinearAttentionLayer"):
        qwen(tokens(1, 4), past_key_values=kept)
    assert not kept.has_previous_state(0)


def test_a_state_of_another_batch_is_refused_before_it_is_touched(qwen):
    enable(qwen)
    kept = cache_utils.DynamicCache(config=qwen.config)
    with torch.no_grad():
        qwen(tokens(2, 4), past_key_values=kept)
        before = states(kept)
        layer = qwen.model.layers[0].linear_attn
        with pytest.raises(IntegrationError, match=r"states of 2 sequences on cpu.*those of the batch: 3"):
            layer(torch.zeros(3, 1, 32), kept)
    assert all(torch.equal(a, b) for a, b in zip(states(kept), before, strict=True))


def test_every_family_has_its_sources_recorded():
    expected = {f"{f.layer}.forward" for f in FAMILIES}
    expected |= {f"{f.layer}.{part}.forward" for f in FAMILIES for part in f.parts}
    assert set(KNOWN) == expected
    assert set(integration.__all__) == {"enable", "disable"}
