"""The model catalogue: the shipped data, tensor-parallel splits, names, and what a broken file says."""

import pytest

from isokern.errors import CatalogueError, UnknownNameError
from isokern.registry.ops.fused_sigmoid_gating.catalogue import (
    Confidence,
    Gate,
    catalogue,
    model,
    parse_catalogue,
)

# Heads of one layer, before any split: H, HV, K, V.
SHAPES = {
    "qwen3-next-80b-a3b": (16, 32, 128, 128),
    "qwen3.5-397b-a17b": (16, 64, 128, 128),
    "qwen3.5-122b-a10b": (16, 64, 128, 128),
    "qwen3.5-35b-a3b": (16, 32, 128, 128),
    "qwen3.5-27b": (16, 48, 128, 128),
    "qwen3.5-9b": (16, 32, 128, 128),
    "qwen3.5-4b": (16, 32, 128, 128),
    "qwen3.5-2b": (16, 16, 128, 128),
    "qwen3.5-0.8b": (16, 16, 128, 128),
    "kimi-linear-48b-a3b": (32, 32, 128, 128),
    "kimi-k3": (96, 96, 128, 128),
    "olmo-hybrid-7b": (30, 30, 96, 192),
}
EVERY_SHARD = [entry.shard(tp) for entry in catalogue().values() for tp in entry.tensor_parallel]


def test_the_catalogue_holds_these_models():
    assert {name: (m.H, m.HV, m.K, m.V) for name, m in catalogue().items()} == SHAPES


def test_the_catalogue_is_read_once_and_cannot_be_changed():
    assert catalogue() is catalogue()
    with pytest.raises(TypeError):
        catalogue()["mine"] = model("kimi-k3")


@pytest.mark.parametrize("shard", EVERY_SHARD, ids=lambda shard: f"{shard.model}/tp{shard.tp}")
def test_every_valid_split_is_whole(shard):
    whole = catalogue()[shard.model]
    assert shard.HV % shard.H == 0
    assert (shard.H * shard.tp, shard.HV * shard.tp) == (whole.H, whole.HV)
    assert shard.HV // shard.H == whole.HV // whole.H  # a value head keeps its q/k head
    assert (shard.K, shard.V, shard.gate, shard.dtypes) == (whole.K, whole.V, whole.gate, whole.dtypes)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "olmo-hybrid-7b"])
def test_all_but_olmo_split_up_to_eight_ways(name):
    assert model(name).tensor_parallel == (1, 2, 4, 8)


@pytest.mark.parametrize("tp", [0, -1, 3, 4, 8])
def test_olmo_splits_two_ways_at_most(tp):
    olmo = model("olmo-hybrid-7b")
    assert (olmo.shard(2).H, olmo.shard(2).HV) == (15, 15)
    with pytest.raises(CatalogueError, match=rf"over {tp} ranks.*H=30 and HV=30.*degrees: 1, 2$"):
        olmo.shard(tp)


def test_kimi_k3_on_eight_ranks_has_twelve_heads_and_a_bounded_gate():
    shard = model("kimi-k3").shard(8)
    assert (shard.H, shard.HV) == (12, 12)
    assert shard.is_kda
    assert shard.lower_bound == -5.0
    assert shard.linear_layers == 69


def test_gates():
    kda = {name for name, entry in catalogue().items() if entry.gate is Gate.KDA}
    assert kda == {"kimi-linear-48b-a3b", "kimi-k3"}
    assert [n for n, m in catalogue().items() if m.lower_bound is not None] == ["kimi-k3"]
    assert [n for n, m in catalogue().items() if m.allow_neg_eigval] == ["olmo-hybrid-7b"]
    assert all(entry.qk_l2norm for entry in catalogue().values())


def test_dtypes_are_those_engines_pass():
    dtypes = model("qwen3-next-80b-a3b").dtypes
    assert {dtypes.q, dtypes.k, dtypes.v, dtypes.a, dtypes.b, dtypes.dt_bias} == {"bfloat16"}
    assert (dtypes.A_log, dtypes.state, dtypes.state_alternatives) == ("float32", "float32", ("bfloat16",))
    assert dtypes.dt_bias_alternatives == ("float32",)
    # A model's own dtypes override single entries, not the whole table.
    assert (model("kimi-k3").dtypes.dt_bias, model("kimi-k3").dtypes.q) == ("float32", "bfloat16")


def test_the_state_of_one_sequence_and_layer():
    assert model("qwen3-next-80b-a3b").shard().state_bytes == 2 * 2**20
    assert model("qwen3-next-80b-a3b").shard(4).state_bytes == 2**19


def test_every_model_says_where_its_numbers_come_from():
    assert all(len(entry.source) > 20 for entry in catalogue().values())
    assert catalogue()["kimi-k3"].confidence is Confidence.DERIVED


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-next-80b-a3b",
        "Qwen3-Next-80B-A3B",
        " Qwen/Qwen3-Next-80B-A3B-Instruct ",
        "qwen/qwen3-next-80b-a3b",
    ],
)
def test_names_are_found_in_any_case_with_the_organisation_or_by_alias(name):
    assert model(name) is catalogue()["qwen3-next-80b-a3b"]


@pytest.mark.parametrize("name", ["qwen3-nxt-80b-a3b", "Qwen/qwen3-nxt-80b-a3b", "qwen3-next-80b"])
def test_unknown_names_come_with_near_ones(name):
    with pytest.raises(UnknownNameError, match="unknown model") as caught:
        model(name)
    assert caught.value.near[0] == "qwen3-next-80b-a3b"
    assert caught.value.known == tuple(sorted(SHAPES))


def test_another_organisations_model_of_the_same_name_is_not_assumed_equal():
    with pytest.raises(UnknownNameError):
        model("somebody/qwen3.5-27b")


GOOD = """
tensor_parallel = [1, 2]
[defaults]
gate = "gdn"
allow_neg_eigval = false
qk_l2norm = true
state_layout = "vk"
[defaults.dtypes]
q = "bfloat16"
k = "bfloat16"
v = "bfloat16"
a = "bfloat16"
b = "bfloat16"
A_log = "float32"
dt_bias = "float32"
state = "float32"
[models.tiny]
title = "Tiny"
org = "me"
H = 2
HV = 4
K = 8
V = 8
source = "made up"
confidence = "derived"
"""


def test_a_minimal_file_is_read():
    tiny = parse_catalogue(GOOD, "t.toml")["tiny"]
    assert (tiny.H, tiny.linear_layers, tiny.aliases, tiny.lower_bound) == (2, None, (), None)
    assert tiny.dtypes.state_alternatives == ()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("H = 2\n", "", "[models.tiny] H: missing"),
        ("H = 2\n", "heads = 2\n", "[models.tiny] H: missing"),
        ("HV = 4", "HV = 5", "[models.tiny] HV: expected a multiple of H=2, given 5"),
        ("K = 8", "K = 0", "[models.tiny] K: expected an integer of one or more, given 0"),
        ("K = 8", 'K = "8"', "[models.tiny] K: expected a value of type int, given '8'"),
        ("K = 8", "K = true", "[models.tiny] K: expected a value of type int, given True"),
        ("V = 8", "V = 8\nlinear_layer = 3", "linear_layer: unknown key; did you mean 'linear_layers'?"),
        (
            "V = 8",
            "V = 8\nlower_bound = 5",
            "[models.tiny] lower_bound: expected a negative number, given 5.0",
        ),
        ("V = 8", "V = 8\naliases = [1]", "[models.tiny] aliases: expected a list of str, given [1]"),
        ("V = 8", 'V = 8\naliases = ["Tiny-2"]', "[models.tiny]: names are lower-case, given 'Tiny-2'"),
        ("V = 8", 'V = 8\naliases = ["tiny"]', "[models.tiny]: 'tiny' already names [models.tiny]"),
        ("V = 8", 'V = 8\ndtypes = "fp8"', "[models.tiny] dtypes: expected a table, given 'fp8'"),
        ('"made up"', '" "', "[models.tiny] source: expected some text"),
        ('"derived"', '"guessed"', "confidence: expected one of published, derived, given 'guessed'"),
        ('gate = "gdn"', 'gate = "gla"', "[models.tiny] gate: expected one of gdn, kda, given 'gla'"),
        ('"vk"', '"hv"', "[models.tiny] state_layout: expected one of kv, vk, given 'hv'"),
        ('state = "float32"', 'state = "fp8"', "[models.tiny.dtypes] state: expected one of float32"),
        (
            'state = "float32"',
            'state = "float32"\nstate_alternatives = ["fp8"]',
            "[models.tiny.dtypes] state_alternatives: expected names among",
        ),
        ("[1, 2]", "[0]", "[top level] tensor_parallel: expected degrees of one or more, given (0,)"),
        ("[models.tiny]", "[model.tiny]", "[top level] models: missing (is 'model' meant for it?)"),
        ("[models.tiny]", "[models", "not valid TOML"),
    ],
)
def test_a_broken_file_names_table_and_key(old, new, told):
    assert old in GOOD
    with pytest.raises(CatalogueError) as caught:
        parse_catalogue(GOOD.replace(old, new, 1), "t.toml")
    assert str(caught.value).startswith("t.toml: ")
    assert told in str(caught.value)


def test_a_model_must_be_a_table():
    text = GOOD[: GOOD.index("[models.tiny]")] + "[models]\ntiny = 3\n"
    with pytest.raises(CatalogueError, match=r"\[models.tiny\]: expected a table, given 3"):
        parse_catalogue(text, "t.toml")
