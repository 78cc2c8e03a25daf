"""Length layouts: what every kind promises, the text form, and the length classes."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isokern.errors import ArgumentValueError
from isokern.registry.ops.fused_sigmoid_gating.lengths import (
    CODE_TRACE,
    CONVERSATION_TRACE,
    LengthKind,
    LengthLayout,
    parse_lengths,
)
from isokern.registry.varlen.classes import LengthClass, class_of_lengths, length_class

SPREAD_KINDS = [kind for kind in LengthKind if kind not in (LengthKind.GROUPS, LengthKind.DECODE)]


@st.composite
def layouts(draw, kinds=tuple(LengthKind)):
    kind = draw(st.sampled_from(kinds))
    if kind is LengthKind.GROUPS:
        runs = st.tuples(st.integers(1, 40), st.integers(0, 3000))
        return LengthLayout.of_groups(draw(st.lists(runs, min_size=1, max_size=5)))
    n = draw(st.integers(0, 80))
    if kind is LengthKind.DECODE:
        return LengthLayout.decode(n)
    least = n if kind in (LengthKind.ONE_LONG, LengthKind.FEW_LONG) else 0
    tokens = draw(st.integers(least, 9000)) if n else 0
    sigma = draw(st.floats(0.01, 4.0)) if kind is LengthKind.LOGNORMAL else None
    return LengthLayout(kind, n, tokens, draw(st.integers(0, 2**63)), sigma)


@given(layouts())
def test_every_layout_holds_exactly_its_tokens_in_exactly_n_sequences(layout):
    lengths = layout.lengths()
    assert len(lengths) == layout.n
    assert sum(lengths) == layout.tokens
    assert all(type(length) is int and length >= 0 for length in lengths)
    assert layout.longest == max(lengths, default=0)


@given(layouts())
def test_a_layout_is_a_pure_function_of_its_fields(layout):
    twin = LengthLayout(layout.kind, layout.n, layout.tokens, layout.seed, layout.sigma, layout.groups)
    assert twin.lengths() == layout.lengths()
    assert hash(twin) == hash(layout)


@given(layouts())
def test_the_text_form_reads_back_to_an_equal_layout(layout):
    assert parse_lengths(str(layout)) == layout


@given(layouts([kind for kind in SPREAD_KINDS if kind is not LengthKind.WITH_EMPTY]))
def test_no_sequence_is_empty_where_there_is_a_token_for_each(layout):
    if layout.tokens >= layout.n:
        assert all(layout.lengths())


@given(st.lists(st.integers(0, 5000), max_size=60))
def test_any_lengths_can_be_spelled_out(lengths):
    assert LengthLayout.of_lengths(lengths).lengths() == tuple(lengths)


@given(layouts())
def test_the_class_of_a_layout_is_the_one_its_lengths_satisfy(layout):
    held = [length for length in layout.lengths() if length]
    ratio = max(held, default=0) * len(held) / max(1, sum(held))
    expected = (
        LengthClass.DECODE
        if max(held, default=0) <= 1
        else LengthClass.UNIFORM
        if ratio <= 1.25
        else LengthClass.MILD
        if ratio <= 4
        else LengthClass.HEAVY
    )
    assert layout.length_class is expected


@pytest.mark.parametrize("kind", [LengthKind.RAGGED, LengthKind.LOGNORMAL, LengthKind.WITH_EMPTY])
def test_seeds_give_different_lengths(kind):
    sigma = 1.0 if kind is LengthKind.LOGNORMAL else None
    drawn = {LengthLayout(kind, 16, 4096, seed, sigma).lengths() for seed in range(8)}
    assert len(drawn) == 8


def test_random_lengths_do_not_change_between_releases():
    """Recorded workloads name layouts by kind and seed, so what a seed draws is part of the format."""
    assert parse_lengths("ragged n=5 tokens=100 seed=7").lengths() == (21, 26, 24, 14, 15)
    assert parse_lengths("lognormal n=5 tokens=8192 sigma=1.36 seed=1").lengths() == (
        1335,
        2549,
        1308,
        143,
        2857,
    )


def test_drawing_leaves_the_global_generator_alone():
    import numpy as np

    before = np.random.get_state()[1].tolist()
    LengthLayout(LengthKind.RAGGED, 9, 100, seed=3).lengths()
    assert np.random.get_state()[1].tolist() == before


def test_decode_is_one_token_each():
    assert LengthLayout.decode(5).lengths() == (1, 1, 1, 1, 1)


def test_uniform_spreads_the_remainder_over_the_first():
    assert LengthLayout(LengthKind.UNIFORM, 4, 10).lengths() == (3, 3, 2, 2)


def test_ragged_stays_around_the_mean():
    lengths = LengthLayout(LengthKind.RAGGED, 200, 200_000, seed=4).lengths()
    # Weights lie within half to one and a half of the mean; the mean of 200 of them within a few percent of 1.
    assert 450 < min(lengths) < 600
    assert 1400 < max(lengths) < 1600


@pytest.mark.parametrize("trace", [CONVERSATION_TRACE, CODE_TRACE], ids=lambda trace: trace.name)
def test_lognormal_has_the_spread_it_is_given(trace):
    logs = [math.log(x) for x in LengthLayout.prompts(trace, 2000, seed=2).lengths()]
    mean = sum(logs) / len(logs)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in logs) / len(logs))
    assert sigma == pytest.approx(trace.sigma, rel=0.08)
    assert mean == pytest.approx(trace.mu, abs=0.2)


def test_one_long_gives_one_token_to_all_others_and_moves_with_the_seed():
    layouts_ = [LengthLayout(LengthKind.ONE_LONG, 64, 2111, seed) for seed in range(6)]
    assert all(sorted(layout.lengths()) == [1] * 63 + [2048] for layout in layouts_)
    assert len({layout.lengths().index(2048) for layout in layouts_}) > 1


def test_few_long_is_a_quarter_of_the_sequences():
    lengths = LengthLayout(LengthKind.FEW_LONG, 64, 48 + 16 * 256, seed=1).lengths()
    assert sorted(lengths) == [1] * 48 + [256] * 16


@pytest.mark.parametrize(("n", "empty"), [(1, set()), (2, {0}), (3, {0, 2}), (4, {0, 2, 3}), (9, {0, 4, 8})])
def test_with_empty_has_empty_sequences_first_in_the_middle_and_last(n, empty):
    lengths = LengthLayout(LengthKind.WITH_EMPTY, n, 900, seed=5).lengths()
    assert {i for i, length in enumerate(lengths) if length == 0} == empty


def test_skew_8192_is_one_of_6208_and_31_of_64():
    layout = LengthLayout.skew(8192)
    assert layout.lengths() == (6208, *[64] * 31)
    assert str(layout) == "skew 8192"
    assert layout.length_class is LengthClass.HEAVY


def test_skew_of_other_sizes_keeps_the_share():
    lengths = LengthLayout.skew(100_000, n=10).lengths()
    assert lengths[0] == pytest.approx(76_000, rel=0.005)
    assert max(lengths[1:]) - min(lengths[1:]) <= 1
    assert str(LengthLayout.skew(100_000, n=10)) == "skew n=10 tokens=100000"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("16x4", (4,) * 16),
        ("63x1+1x2048", (1,) * 63 + (2048,)),
        ("2x0+1x5", (0, 0, 5)),
        ("decode n=3", (1, 1, 1)),
        ("uniform n=3 tokens=7", (3, 2, 2)),
        ("skew n=32 tokens=8192 seed=1", (6208, *[64] * 31)),
    ],
)
def test_text_forms(text, lengths):
    layout = parse_lengths(text)
    assert layout.lengths() == lengths
    assert str(layout) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'16x4'"),
        ("16x-4", "'16x-4'"),
        ("0x4", "counts of one or more"),
        ("skew", "n=<integer"),
        ("lognomal n=8 tokens=64 sigma=1", "did you mean 'lognormal'?"),
        ("lognormal n=8 tokens=64", "positive finite number"),
        ("lognormal n=8 tokens=64 sigma=nan", "positive finite number"),
        ("lognormal n=8 tokens=64 sigma=wide", "sigma=<number>"),
        ("ragged n=8 tokens=64 sigma=1", "none for ragged"),
        ("ragged n=8 token=64", "did you mean 'tokens'?"),
        ("ragged n=8 n=9 tokens=64", "'n' is repeated"),
        ("ragged n=8 tokens=-64", "tokens=<integer of zero or more>"),
        ("decode n=8 tokens=9", "one per decode row"),
        ("one_long n=8 tokens=7", "at least n=8"),
        ("ragged n=0 tokens=7", "no sequence"),
    ],
)
def test_malformed_texts_say_what_is_wrong(text, told):
    with pytest.raises(ArgumentValueError) as caught:
        parse_lengths(text)
    assert told in str(caught.value)


@pytest.mark.parametrize("field", ["n", "tokens", "seed"])
def test_negative_counts_are_refused(field):
    with pytest.raises(ArgumentValueError, match="zero or more") as caught:
        LengthLayout(LengthKind.RAGGED, **{"n": 2, "tokens": 8, "seed": 0} | {field: -1})
    assert caught.value.argument == field


def test_groups_must_agree_with_their_totals():
    with pytest.raises(ArgumentValueError, match="2 sequences and 8 tokens"):
        LengthLayout(LengthKind.GROUPS, 3, 8, groups=((2, 4),))


@pytest.mark.parametrize(
    ("n", "tokens", "longest", "expected"),
    [
        (0, 0, None, "decode"),
        (4, 0, 0, "decode"),
        (8, 8, None, "decode"),
        (8, 8, 1, "decode"),
        (8, 6, 1, "decode"),
        (1, 500, None, "uniform"),  # a lone sequence is its own longest
        (2, 500, None, "unknown"),
        (4, 400, 100, "uniform"),
        (4, 400, 125, "uniform"),  # exactly 1.25 times the mean
        (4, 400, 126, "mild"),
        (8, 800, 400, "mild"),  # exactly 4 times the mean
        (8, 800, 401, "heavy"),
        (64, 2111, 2048, "heavy"),
    ],
)
def test_length_classes(n, tokens, longest, expected):
    assert length_class(n, tokens, longest) == expected


def test_empty_sequences_do_not_make_a_batch_uneven():
    assert class_of_lengths((0, 100, 0, 100, 0)) is LengthClass.UNIFORM
    assert length_class(5, 200, 100) is LengthClass.MILD
    assert length_class(5, 200, 100, empty=3) is LengthClass.UNIFORM


@given(st.integers(1, 200), st.integers(1, 10_000))
def test_a_longer_longest_never_makes_a_batch_more_even(n, tokens):
    order = [LengthClass.DECODE, LengthClass.UNIFORM, LengthClass.MILD, LengthClass.HEAVY]
    places = [order.index(length_class(n, tokens, longest)) for longest in range(0, tokens + 1, 7)]
    assert all(a <= b for a, b in pairwise(places))


@pytest.mark.parametrize("module", ["lengths", "catalogue", "cases", "workloads"])
def test_importing_needs_no_torch(module):
    code = f"import isokern.registry.ops.fused_sigmoid_gating.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_more_sequences_than_could_be_spelled_out_are_refused():
    from isokern.registry.ops.fused_sigmoid_gating.workload_case import parse_case

    for name in ("decode N=99999999999999", "mixed 99999999999999x1+1x5"):
        with pytest.raises(ArgumentValueError, match="at most 4194304 sequences"):
            parse_case(name)
