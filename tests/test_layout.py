"""SequenceLayout and VarlenProfile: what the host knows of a batch's sequences."""

from __future__ import annotations

import pytest
import torch

from isokern.errors import ArgumentTypeError, ArgumentValueError
from isokern.registry.varlen import layout as layout_module
from isokern.registry.varlen.classes import LengthClass
from isokern.registry.varlen.layout import SequenceLayout, check_offsets
from isokern.registry.varlen.profile import VarlenProfile, bucket

LENGTHS = (5, 0, 100, 10, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_lengths_and_from_cu_seqlens_agree(dtype):
    one = SequenceLayout.from_lengths(LENGTHS, dtype=dtype)
    two = SequenceLayout.from_cu_seqlens(torch.tensor([0, 5, 5, 105, 115, 116], dtype=dtype))
    for layout in (one, two):
        assert layout.cu_seqlens.dtype is dtype
        assert layout.cu_seqlens.tolist() == list(layout.offsets) == [0, 5, 5, 105, 115, 116]
        assert (layout.n, layout.tokens, layout.longest) == (5, 116, 100)
        assert layout.lengths == LENGTHS
        assert layout.profile == VarlenProfile.of(5, 116, 100)
        assert layout.length_class is layout.profile.length_class


def test_lengths_default_to_int32():
    assert SequenceLayout.from_lengths(LENGTHS).cu_seqlens.dtype is torch.int32


def test_the_given_tensor_is_kept():
    cu = torch.tensor([0, 2])
    assert SequenceLayout.from_cu_seqlens(cu).cu_seqlens is cu


def test_offsets_go_to_the_device_asked_for():
    layout = SequenceLayout.from_lengths(LENGTHS, device="meta")
    assert layout.cu_seqlens.device.type == "meta"
    assert layout.offsets[-1] == 116


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_nothing_is_a_valid_batch(lengths):
    layout = SequenceLayout.from_lengths(lengths)
    assert (layout.n, layout.tokens, layout.longest, layout.lengths) == (len(lengths), 0, 0, lengths)
    assert layout.chunk_offsets(64) == (0,) * (len(lengths) + 1)
    assert layout.split(1) == (tuple(range(len(lengths))), ())
    assert layout.length_class is LengthClass.DECODE


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([], "N + 1"),
        ([1, 2], "starting at 0"),
        ([-1, 2], "starting at 0"),
        ([0, 3, 2], "decrease"),
        ([0, -1], "decrease"),
    ],
)
def test_impossible_offsets(offsets, expected):
    for make in (
        lambda: check_offsets(offsets),
        lambda: SequenceLayout.from_cu_seqlens(torch.tensor(offsets, dtype=torch.int32)),
    ):
        with pytest.raises(ArgumentValueError) as caught:
            make()
        assert caught.value.argument == "cu_seqlens"
        assert expected in caught.value.expected


@pytest.mark.parametrize(
    ("cu", "error"),
    [
        ([0, 2], ArgumentTypeError),
        (None, ArgumentTypeError),
        (torch.tensor([0.0, 2.0]), ArgumentTypeError),
        (torch.tensor([0, 2], dtype=torch.int16), ArgumentTypeError),
        (torch.tensor([False, True]), ArgumentTypeError),
        (torch.tensor(0), ArgumentValueError),
        (torch.tensor([[0, 2]]), ArgumentValueError),
    ],
    ids=["list", "None", "float", "int16", "bool", "scalar", "matrix"],
)
def test_no_offsets_at_all(cu, error):
    with pytest.raises(error) as caught:
        SequenceLayout.from_cu_seqlens(cu)
    assert caught.value.argument == "cu_seqlens"


def test_a_negative_length_is_named():
    with pytest.raises(ArgumentValueError, match=r"lengths\[1\] = -2") as caught:
        SequenceLayout.from_lengths((3, -2))
    assert caught.value.argument == "lengths"


def test_more_tokens_than_int32_can_count():
    with pytest.raises(ArgumentValueError) as caught:
        SequenceLayout.from_lengths((2**31,))
    assert caught.value.argument == "dtype"
    assert SequenceLayout.from_lengths((2**31,), dtype=torch.int64).tokens == 2**31
    assert SequenceLayout.from_lengths((2**31 - 1,)).tokens == 2**31 - 1


def test_chunks_never_span_two_sequences():
    layout = SequenceLayout.from_lengths((5, 0, 64, 65, 128, 1))
    assert layout.chunk_offsets(64) == (0, 1, 1, 2, 4, 6, 7)
    assert layout.chunk_offsets(1) == layout.offsets
    with pytest.raises(ArgumentValueError) as caught:
        layout.chunk_offsets(0)
    assert caught.value.argument == "chunk"


def test_split_keeps_the_batch_order():
    layout = SequenceLayout.from_lengths(LENGTHS)
    assert layout.split(5) == ((0, 1, 4), (2, 3))
    assert layout.split(0) == ((1,), (0, 2, 3, 4))
    assert layout.split(100) == ((0, 1, 2, 3, 4), ())


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((1, 1, 9, 8, 1), [((1, 1), False), ((9, 8), True), ((1,), False)]),
        ((9, 1), [((9,), True), ((1,), False)]),
        ((4, 5), [((4,), False), ((5,), True)]),
        ((0, 9, 0, 8, 0, 1, 0), [((0, 9, 0, 8, 0), True), ((1, 0), False)]),
        ((1, 2, 3), [((1, 2, 3), False)]),
        ((7, 0), [((7, 0), True)]),
        ((0, 0), []),
        ((), []),
    ],
)
def test_runs_are_cut_where_short_and_long_sequences_meet(lengths, expected):
    layout = SequenceLayout.from_lengths(lengths)
    spans = layout.spans(4)
    assert [(lengths[s.first : s.last], s.long) for s in spans] == expected
    assert [(s.start, s.stop) for s in spans] == [(layout.offsets[s.first], layout.offsets[s.last]) for s in spans]
    for run in layout.runs(4):
        assert run.layout.lengths == lengths[run.span.first : run.span.last]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_offsets_of_a_run_start_at_0_and_stand_beside_the_layout_s(dtype):
    layout = SequenceLayout.from_lengths((1, 1, 9, 0, 8, 1), dtype=dtype)
    first, second, third = (run.layout for run in layout.runs(4))
    for part, offsets in ((first, (0, 1, 2)), (second, (0, 9, 9, 17)), (third, (0, 1))):
        assert part.offsets == tuple(part.cu_seqlens.tolist()) == offsets
        assert part.cu_seqlens.dtype is dtype
        assert part.cu_seqlens.is_contiguous()
    assert first.cu_seqlens.data_ptr() == layout.cu_seqlens.data_ptr(), "a view: they start at 0 as they are"
    assert SequenceLayout.from_lengths((1, 9), device="meta").runs(4)[1].layout.cu_seqlens.device.type == "meta"


def test_runs_are_made_once_per_threshold():
    layout = SequenceLayout.from_lengths((1, 9, 3))
    assert layout.runs(4) is layout.runs(4)
    assert [run.layout.lengths for run in layout.runs(2)] == [(1,), (9, 3)]
    assert layout.runs(1) is not layout.runs(2)


def test_a_batch_of_one_run_is_its_own_layout():
    layout = SequenceLayout.from_lengths((1, 2, 0))
    [run] = layout.runs(4)
    assert run.layout is layout


class OnGpu(torch.Tensor):
    """Offsets that say they are on a GPU."""

    is_cuda = True


def test_what_a_capture_makes_belongs_to_its_graph(monkeypatch):
    layout = SequenceLayout((0, 1, 10), torch.tensor([0, 1, 10]).as_subclass(OnGpu))
    monkeypatch.setattr(layout_module, "_capturing", lambda: True)
    captured = layout.runs(4)
    assert layout.runs(4) is not captured, "a graph's memory is reused: no other call may read it"
    monkeypatch.setattr(layout_module, "_capturing", lambda: False)
    kept = layout.runs(4)
    monkeypatch.setattr(layout_module, "_capturing", lambda: True)
    assert layout.runs(4) is kept


def test_by_length_is_longest_first_and_stable():
    assert SequenceLayout.from_lengths((2, 7, 2, 0, 7)).by_length == (1, 4, 0, 2, 3)


def test_repr_says_what_it_holds():
    assert repr(SequenceLayout.from_lengths(LENGTHS)).startswith("SequenceLayout(N<=8 tokens<=128 longest<=128")


# ---------------------------------------------------------------------------------------------------------------
# Buckets and classes


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1024, 1024), (1025, 2048)]
)
def test_buckets_are_powers_of_two(value, expected):
    assert bucket(value) == expected


def test_a_negative_count_has_no_bucket():
    with pytest.raises(ValueError, match="-1"):
        bucket(-1)


def test_profiles_share_a_bucket_when_they_should():
    assert VarlenProfile.of(5, 100, 30) == VarlenProfile.of(8, 128, 32)
    assert VarlenProfile.of(8, 128, 32) != VarlenProfile.of(9, 128, 32)


@pytest.mark.parametrize(
    ("lengths", "kind"),
    [
        ((1,) * 8, LengthClass.DECODE),
        ((1, 0, 1), LengthClass.DECODE),
        ((7,), LengthClass.UNIFORM),
        ((4, 4, 4), LengthClass.UNIFORM),
        ((4, 0, 4), LengthClass.UNIFORM),
        ((5, 5, 5, 1), LengthClass.UNIFORM),
        ((10, 5, 3), LengthClass.MILD),
        ((1,) * 15 + (100,), LengthClass.HEAVY),
    ],
)
def test_class_of_known_lengths(lengths, kind):
    longest = max(lengths)
    profile = SequenceLayout.from_lengths(lengths).profile
    assert profile.longest == bucket(longest)
    from isokern.registry.varlen.classes import class_of_lengths

    assert class_of_lengths(lengths) is kind
    if 0 not in lengths:
        assert profile.length_class is kind


def test_an_unknown_longest_is_guessed_only_from_the_mean():
    decode = VarlenProfile.of(8, 8, None)
    assert decode == VarlenProfile.of(8, 8, 1)
    assert (decode.length_class, decode.longest) == (LengthClass.DECODE, 1)

    unknown = VarlenProfile.of(8, 100, None)
    assert (unknown.length_class, unknown.longest) == (LengthClass.UNKNOWN, None)
    assert "?" in unknown.label


def test_a_lone_sequence_is_its_own_longest():
    assert VarlenProfile.of(1, 100, None).length_class is LengthClass.UNIFORM


def test_no_token_reads_as_decode():
    for longest in (0, None):
        assert VarlenProfile.of(0, 0, longest).length_class is LengthClass.DECODE
        assert VarlenProfile.of(4, 0, longest).length_class is LengthClass.DECODE
    assert VarlenProfile.of(4, 0, None) == VarlenProfile.of(4, 0, 1)


def test_label_for_humans():
    assert VarlenProfile.of(64, 64, 1).label == "N<=64 tokens<=64 longest<=1 decode"
