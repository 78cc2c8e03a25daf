"""Cases, the default serving workloads, and workload files: what they hold, and what a broken one says."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isokern.errors import ArgumentValueError, WorkloadError
from isokern.registry.ops.fused_sigmoid_gating.catalogue import catalogue, model
from isokern.registry.ops.fused_sigmoid_gating.lengths import LengthKind, LengthLayout, parse_lengths
from isokern.registry.ops.fused_sigmoid_gating.workload_case import (
    STATE_DTYPES,
    STATE_LAYOUTS,
    Case,
    Phase,
    Policy,
    Tier,
    Verify,
    case_name,
    parse_case,
)
from isokern.registry.ops.fused_sigmoid_gating.workload_files import format_workloads, parse_workloads
from isokern.registry.ops.fused_sigmoid_gating.workloads import (
    default_cases,
    dump_workloads,
    load_workloads,
    of_tier,
    serving_cases,
)
from isokern.registry.varlen.classes import LengthClass

EXAMPLES = Path(__file__).parent.parent / "examples" / "workloads"
FULL = default_cases()


# --- names


@pytest.mark.parametrize(
    ("name", "phase", "lengths"),
    [
        ("decode N=64", Phase.DECODE, "decode n=64"),
        ("verify 16x4", Phase.VERIFY, "16x4"),
        ("prefill 1x1024", Phase.PREFILL, "1x1024"),
        ("prefill short 16x8", Phase.PREFILL, "16x8"),
        ("prefill skew 8192", Phase.PREFILL, "skew 8192"),
        ("mixed 63x1+1x2048", Phase.MIXED, "63x1+1x2048"),
    ],
)
def test_a_conventional_name_says_it_all(name, phase, lengths):
    case = parse_case(name)
    assert (case.name, case.phase, case.lengths) == (name, phase, parse_lengths(lengths))
    assert case_name(case.phase, case.lengths, case.verify) == name


def test_names_carry_the_state_dtype_and_the_kind_of_verification():
    assert parse_case("decode N=64 bfloat16").state_dtype == "bfloat16"
    chain, tree = parse_case("verify 16x4 float16"), parse_case("verify tree 4x8")
    assert (chain.verify, chain.draft_tokens, chain.state_dtype) == (Verify.CHAIN, 4, "float16")
    assert (tree.verify, tree.draft_tokens, tree.state_dtype) == (Verify.TREE, 8, None)
    assert case_name(Phase.VERIFY, chain.lengths, Verify.CHAIN, "float16") == chain.name


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_every_default_name_is_conventional(case):
    assert case_name(case.phase, case.lengths, case.verify, case.state_dtype) == case.name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "starts with one of decode"),
        ("decod N=64", "did you mean 'decode'?"),
        ("decode 64", "'decode N=<rows>'"),
        ("decode N=-1", "'decode N=<rows>'"),
        ("prefill 16x8", "expected 'prefill short 16x8'"),
        ("prefill short 1x65", "expected 'prefill 1x65'"),
        ("mixed short 3x1+1x16", "expected 'mixed 3x1+1x16'"),
        ("mixed 63x1+1", "expected lengths such as"),
        ("verify 4x4 fp8", "expected lengths such as"),
    ],
)
def test_unconventional_names_are_refused(name, told):
    with pytest.raises(ArgumentValueError) as caught:
        parse_case(name)
    assert told in str(caught.value)


# --- cases


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"name": " padded"}, "name"),
        ({"state_dtype": "fp8"}, "state_dtype"),
        ({"state_layout": "hv"}, "state_layout"),
        ({"lengths": LengthLayout.of_lengths([1, 2])}, "lengths"),
        ({"verify": Verify.CHAIN}, "verify"),
        ({"draft_tokens": 1}, "verify"),
        ({"phase": Phase.VERIFY}, "verify"),
        ({"phase": Phase.VERIFY, "verify": Verify.CHAIN}, "draft_tokens"),
        (
            {
                "phase": Phase.VERIFY,
                "verify": Verify.TREE,
                "draft_tokens": 3,
                "lengths": LengthLayout.of_lengths([4]),
            },
            "draft_tokens",
        ),
    ],
)
def test_a_case_that_contradicts_itself_names_the_field(changes, argument):
    fields = {"name": "c", "phase": Phase.DECODE, "lengths": LengthLayout.decode(2)} | changes
    with pytest.raises(ArgumentValueError) as caught:
        Case(**fields)
    assert caught.value.argument == argument


def test_verification_may_hold_fewer_tokens_than_were_drafted():
    lengths = LengthLayout.of_lengths([4, 2, 0])
    assert Case("c", Phase.VERIFY, lengths, verify=Verify.CHAIN, draft_tokens=4).draft_tokens == 4


# --- default workloads


def test_wide_has_every_bucket_of_decode_and_batches_of_rows_beside_a_prompt_of_any_length():
    wide = default_cases(Tier.WIDE)
    assert len(wide) <= 25
    decoded = {case.lengths.n for case in wide if case.phase is Phase.DECODE}
    assert decoded == {1, 2, 4, 8, 16, 32, 64, 128, 256}
    prompts = {case.lengths.longest for case in wide if case.phase is Phase.MIXED}
    assert {16, 30, 256, 512, 1024, 2048} == prompts
    assert sum(case.lengths.tokens for case in wide) < 8192


def test_core_spans_every_phase_in_few_cases():
    core = default_cases(Tier.CORE)
    assert 10 <= len(core) <= 14
    assert {case.phase for case in core} == set(Phase)
    assert {case.verify for case in core} == set(Verify)
    assert sum(case.lengths.tokens for case in core) < 4096
    wanted = {
        "decode N=1",
        "decode N=8",
        "decode N=64",
        "verify 4x4",
        "verify 16x4",
        "prefill short 1x64",
        "prefill 1x1024",
        "prefill 4x256",
        "mixed 15x1+1x256",
        "mixed 47x1+1x1024",
    }
    assert wanted <= {case.name for case in core}


def test_smoke_is_tiny_and_spans_every_phase():
    smoke = default_cases(Tier.SMOKE)
    assert {case.phase for case in smoke} == set(Phase)
    assert sum(case.lengths.tokens for case in smoke) <= 128


def test_tiers_nest():
    tiers = [default_cases(tier) for tier in Tier]
    assert len(tiers[0]) < len(tiers[1]) < len(tiers[2]) < len(tiers[3])
    assert all(set(small) <= set(large) for small, large in pairwise(tiers))
    assert of_tier(FULL, Tier.CORE) == default_cases(Tier.CORE)


def test_full_covers_the_grids():
    names = {case.name for case in FULL}
    assert len(names) == len(FULL)
    assert {f"decode N={n}" for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)} <= names
    assert {f"verify {n}x{t}" for n in (1, 4, 16, 64) for t in (2, 4, 8, 16)} <= names
    assert {f"prefill 1x{t}" for t in (512, 1024, 2048, 4096, 8192)} <= names
    assert {"prefill 8x1024", "prefill 64x128", "prefill skew 8192"} <= names
    assert sum(case.verify is Verify.TREE for case in FULL) == 1
    assert max(case.lengths.tokens for case in FULL) == 8192


def test_mixed_cases_have_decode_rows_beside_a_prompt():
    mixed = [case for case in FULL if case.phase is Phase.MIXED]
    assert len(mixed) >= 8
    for case in mixed:
        lengths = case.lengths.lengths()
        assert lengths.count(1) >= 3
        assert max(lengths) > 1
        assert case.lengths.length_class in (LengthClass.MILD, LengthClass.HEAVY)


def test_prompts_include_lengths_drawn_from_both_traces():
    sigmas = {c.lengths.sigma for c in FULL if c.lengths.kind is LengthKind.LOGNORMAL}
    assert sigmas == {0.99, 1.36}


@pytest.mark.parametrize("name", catalogue())
def test_every_model_is_also_decoded_in_its_alternative_state_dtypes(name):
    cases = serving_cases(model(name))
    extra = [case for case in cases if case not in FULL]
    assert {case.state_dtype for case in extra} == set(model(name).dtypes.state_alternatives)
    assert {case.name for case in extra} >= {"decode N=1 bfloat16", "decode N=256 bfloat16"}
    assert serving_cases(model(name), Tier.CORE) == default_cases(Tier.CORE)


# --- files


@st.composite
def cases(draw):
    phase = draw(st.sampled_from(Phase))
    if phase is Phase.DECODE:
        lengths = LengthLayout.decode(draw(st.integers(0, 300)))
    elif draw(st.booleans()):
        lengths = LengthLayout.of_lengths(draw(st.lists(st.integers(0, 16), max_size=6)))
    else:
        sigma = draw(st.floats(0.1, 3))
        lengths = LengthLayout(LengthKind.LOGNORMAL, 5, draw(st.integers(0, 99)), draw(st.integers(0, 9)), sigma)
    verify, draft = Verify.NONE, 0
    if phase is Phase.VERIFY:
        verify = draw(st.sampled_from([Verify.CHAIN, Verify.TREE]))
        draft = max(1, lengths.longest) + draw(st.integers(0, 3))
    text = st.text(min_size=1, max_size=12).filter(lambda s: s.isprintable() and s == s.strip())
    plain = st.sampled_from(["true", "12", "null", "decode N=64", "- a: b", "#", "1x64", "é ‖k‖", "'", '"'])
    return Case(
        draw(text | plain),
        phase,
        lengths,
        draw(st.sampled_from([None, *STATE_DTYPES])),
        verify,
        draft,
        draw(st.sampled_from([None, *Policy])),
        draw(st.sampled_from([None, *STATE_LAYOUTS])),
        draw(st.sampled_from(Tier)),
    )


@given(st.lists(cases(), min_size=1, max_size=4, unique_by=lambda case: case.name))
def test_what_is_written_reads_back_equal(written):
    assert parse_workloads(format_workloads(written)) == tuple(written)


def test_the_defaults_survive_a_file(tmp_path):
    path = tmp_path / "w.yaml"
    dump_workloads(FULL, path)
    assert load_workloads(path) == FULL
    dump_workloads(FULL[:2], path)  # replaces
    assert load_workloads(str(path)) == FULL[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["w.yaml"]


def test_a_written_file_leaves_defaults_out():
    assert format_workloads([parse_case("verify 16x4")]).splitlines() == [
        "op: fused_sigmoid_gating",
        "cases:",
        "- name: verify 16x4",
        "  phase: verify",
        "  lengths: 16x4",
        "  verify: chain",
        "  draft_tokens: 4",
    ]


def test_names_stay_readable_in_a_written_file():
    case = Case("Entwürfe prüfen", Phase.DECODE, LengthLayout.decode(2))
    assert "- name: Entwürfe prüfen\n" in format_workloads([case])


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    path = tmp_path / "w.yaml"
    with pytest.raises(WorkloadError, match="no cases"):
        dump_workloads([], path)
    with pytest.raises(WorkloadError, match="two cases are named 'decode N=1'"):
        dump_workloads([FULL[0], FULL[0]], path)
    assert not path.exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "directory"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        dump_workloads(FULL[:1], target)
    assert list(tmp_path.iterdir()) == [target]


def test_entries_may_be_names_fields_or_both():
    text = """\
op: fused_sigmoid_gating
about: three ways to say it
cases:
  - verify 16x4
  - {name: decode N=64, tier: core, policy: graph}
  - phase: mixed
    lengths: [1, 1, 256]
  - name: mine
    phase: prefill
    lengths: lognormal n=4 tokens=999 sigma=0.99
    state_layout: vk
    state_dtype: float16
"""
    verify, decode, mixed, mine = parse_workloads(text)
    assert verify == parse_case("verify 16x4")
    assert decode == Case("decode N=64", Phase.DECODE, LengthLayout.decode(64), policy=Policy.GRAPH, tier=Tier.CORE)
    assert (mixed.name, mixed.lengths) == ("mixed 2x1+1x256", parse_lengths("2x1+1x256"))
    assert (mine.lengths.sigma, mine.state_layout, mine.state_dtype) == (0.99, "vk", "float16")


HEAD = "op: fused_sigmoid_gating\ncases:\n"


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("", 1, "the file is empty"),
        ("# nothing\n\n", 1, "the file is empty"),
        ("- a\n", 1, "expected a mapping with keys among op, about, cases, given a list"),
        ("cases: []\n", 1, "missing key 'op'"),
        ("op: fused_sigmoid_gating\n", 1, "missing key 'cases'"),
        ("op: other\ncases: [decode N=1]\n", 1, "op: expected 'fused_sigmoid_gating', given 'other'"),
        ("op: fused_sigmoid_gating\ncase: []\n", 2, "unknown key 'case'; did you mean 'cases'?"),
        (
            "op: fused_sigmoid_gating\nabout: 3\ncases: [decode N=1]",
            2,
            "about: expected text, given an integer, '3'",
        ),
        (HEAD + "  - decode N=1\nop: fused_sigmoid_gating\n", 4, "key 'op' is repeated"),
        (HEAD, 2, "cases: expected a list, given nothing"),
        ("op: fused_sigmoid_gating\n\ncases: []\n", 3, "at least one case"),
        (HEAD + "  decode: 1\n", 3, "cases: expected a list, given a mapping"),
        (HEAD + "  - decode N=1\n  - 3\n", 4, "case: expected text, given an integer, '3'"),
        (HEAD + "  - decode N=1\n  - decod N=2\n", 4, "did you mean 'decode'?"),
        (HEAD + "  - decode N=1\n  - verify 1x2\n  - decode N=1\n", 5, "already used on line 3"),
        (HEAD + "  - name: a\n    phase: decode\n", 3, "missing key 'lengths'"),
        (HEAD + "  - lengths: 1x64\n", 3, "missing key 'phase'"),
        (HEAD + "  - name: a\n    phase: prefil\n    lengths: 1x64\n", 4, "did you mean 'prefill'?"),
        (HEAD + "  - name: a\n    phase: prefill\n    length: 1x64\n", 5, "did you mean 'lengths'?"),
        (HEAD + "  - phase: prefill\n    lengths: 1x-64\n", 4, "'1x-64'"),
        (
            HEAD + "  - phase: prefill\n    lengths: lognomal n=2 tokens=8 sigma=1\n",
            4,
            "did you mean 'lognormal'?",
        ),
        (HEAD + "  - phase: prefill\n    lengths:\n      - 4\n      - -3\n", 6, "zero or more, given -3"),
        (
            HEAD + "  - phase: prefill\n    lengths:\n      - 4\n      - 3.5\n",
            6,
            "an integer, given a number, '3.5'",
        ),
        (HEAD + "  - phase: prefill\n    lengths:\n      - 0x1F\n", 5, "decimal integer"),
        (HEAD + "  - phase: prefill\n    lengths: 64\n", 4, "lengths: expected text, given an integer, '64'"),
        (HEAD + "  - phase: prefill\n    lengths: {n: 64}\n", 4, "lengths: expected text, given a mapping"),
        (
            HEAD + "  - phase: decode\n    name: a\n    lengths: 2x2\n",
            5,
            "at most one token per sequence in decode",
        ),
        (HEAD + "  - name: decode N=1\n    state_dtype: float31\n", 4, "did you mean 'float32'?"),
        (HEAD + "  - name: decode N=1\n    policy: grahp\n", 4, "did you mean 'graph'?"),
        (HEAD + "  - name: decode N=1\n    policy: null\n", 4, "policy: expected text, given nothing"),
        (
            HEAD + "  - name: decode N=1\n    tier: true\n",
            4,
            "tier: expected text, given a truth value, 'true'",
        ),
        (
            HEAD + "  - name: decode N=1\n    draft_tokens: four\n",
            4,
            "draft_tokens: expected an integer, given text",
        ),
        (
            HEAD + "  - name: verify 2x4\n    tier: core\n    draft_tokens: 3\n",
            5,
            "longest sequence's 4, given 3",
        ),
        (HEAD + "  - phase: verify\n    lengths: 2x4\n", 3, "chain or tree in phase verify, given none"),
        (HEAD + "  - decode N=1\n  - [\n", 5, "not valid YAML"),
        (HEAD + "  - decode N=1\n\t- decode N=2\n", 4, "not valid YAML"),
        (HEAD + "  - decode N=1\n---\nop: x\n", 4, "not valid YAML"),
        (HEAD + "  - decode N=1\n  - \x07\n", 4, "not valid YAML"),
        (HEAD + "  - !!python/object:os.system {}\n", 3, "given tag:yaml.org,2002:python/object:os.system"),
    ],
)
def test_a_malformed_file_names_its_line(text, line, told):
    with pytest.raises(WorkloadError) as caught:
        parse_workloads(text, "w.yaml")
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"w.yaml:{line}: ")
    assert (caught.value.source, caught.value.line) == ("w.yaml", line)


def test_a_file_that_cannot_be_read_is_a_workload_error(tmp_path):
    missing = tmp_path / "none.yaml"
    with pytest.raises(WorkloadError, match="cannot be read: No such file") as caught:
        load_workloads(missing)
    assert (caught.value.source, caught.value.line) == (str(missing), None)


def test_bytes_that_are_no_text_are_located(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_bytes(HEAD.encode() + b"  - \xff\n")
    with pytest.raises(WorkloadError, match=re.escape(f"{path}:3: not UTF-8 text")):
        load_workloads(path)


@pytest.mark.parametrize("name", ["chat", "code"])
def test_the_examples_load_and_hold_decode_and_mixed_batches(name):
    loaded = load_workloads(EXAMPLES / f"{name}.yaml")
    assert {Phase.DECODE, Phase.PREFILL, Phase.MIXED} <= {case.phase for case in loaded}
    assert all(case.lengths.tokens <= 8192 for case in loaded)  # one step's budget
    assert of_tier(loaded, Tier.CORE)
    assert parse_workloads(format_workloads(loaded)) == loaded
