"""SequenceLayout from what others know, its tensors on the device, and GraphLayout, whose tensors stay in place."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from isokern import registry
from isokern.errors import ArgumentError, ArgumentTypeError, ArgumentValueError
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.varlen import layout as layout_module
from isokern.registry.varlen.layout import SequenceLayout

LENGTHS = (5, 0, 100, 10, 1)
OFFSETS = (0, 5, 5, 105, 115, 116)


class Unreadable(torch.Tensor):
    """Stands for a tensor on a device: reading it would wait."""

    def tolist(self):
        raise AssertionError("read back from the device")


def on_device(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype).as_subclass(Unreadable)


class TestOnTheDevice:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_chunk_offsets_and_split_stand_beside_the_offsets(self, dtype):
        layout = SequenceLayout.from_lengths(LENGTHS, dtype=dtype)
        for chunk in (1, 16, 64):
            found = layout.device_chunk_offsets(chunk)
            assert (found.dtype, tuple(found.tolist())) == (dtype, layout.chunk_offsets(chunk))
        for threshold in (0, 5, 1000):
            short, long = layout.device_split(threshold)
            assert (tuple(short.tolist()), tuple(long.tolist())) == layout.split(threshold)
            assert short.dtype is long.dtype is dtype

    def test_they_are_on_its_device(self):
        layout = SequenceLayout.from_lengths(LENGTHS, device="meta")
        tensors = (layout.device_chunk_offsets(64), *layout.device_split(8))
        assert [t.device.type for t in tensors] == ["meta"] * 3
        assert [len(t) for t in tensors] == [6, 3, 2]

    def test_they_are_copied_once(self, monkeypatch):
        layout = SequenceLayout.from_lengths(LENGTHS)
        first = layout.device_chunk_offsets(64), *layout.device_split(8)
        monkeypatch.setattr(layout_module, "to_device", None)
        second = layout.device_chunk_offsets(64), *layout.device_split(8)
        assert all(x is y for x, y in zip(first, second, strict=True))

    def test_impossible_chunks(self):
        with pytest.raises(ArgumentValueError, match="chunk"):
            SequenceLayout.from_lengths(LENGTHS).device_chunk_offsets(0)


class TestFromOthers:
    def test_lengths_may_be_a_tensor_or_an_array_on_the_host(self):
        for lengths in (torch.tensor(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32), np.array(LENGTHS)):
            assert SequenceLayout.from_lengths(lengths).offsets == OFFSETS
        with pytest.raises(ArgumentValueError, match="lengths"):
            SequenceLayout.from_lengths(torch.tensor(LENGTHS, device="meta"))
        for bad in (torch.tensor([1.0]), torch.tensor([[1]])):
            with pytest.raises(ArgumentTypeError, match="lengths"):
                SequenceLayout.from_lengths(bad)

    def test_query_start_loc_with_host_offsets_or_lengths_is_not_read_back(self):
        loc = on_device(OFFSETS)
        for host in (
            {"query_start_loc_cpu": torch.tensor(OFFSETS)},
            {"query_start_loc_cpu": OFFSETS},
            {"lengths": LENGTHS, "max_query_len": 100},
            {"lengths": torch.tensor(LENGTHS)},
        ):
            layout = SequenceLayout.from_query_start_loc(loc, **host)
            assert layout.cu_seqlens is loc
            assert (layout.offsets, layout.lengths, layout.longest) == (OFFSETS, LENGTHS, 100)

    def test_query_start_loc_alone_is_read_once(self):
        loc = torch.tensor(OFFSETS, dtype=torch.int32)
        assert SequenceLayout.from_query_start_loc(loc).offsets == OFFSETS

    @pytest.mark.parametrize(
        ("host", "argument"),
        [
            ({"lengths": LENGTHS[:-1]}, "lengths"),
            ({"query_start_loc_cpu": OFFSETS[:-1]}, "query_start_loc_cpu"),
            ({"query_start_loc_cpu": (0, 5, 4, 105, 115, 116)}, "query_start_loc_cpu"),
            ({"query_start_loc_cpu": torch.tensor(OFFSETS, device="meta")}, "query_start_loc_cpu"),
            ({"lengths": LENGTHS, "max_query_len": 99}, "max_query_len"),
            ({"lengths": (5, 0, 100, 10, -1)}, "lengths"),
        ],
    )
    def test_metadata_that_does_not_fit_is_named(self, host, argument):
        with pytest.raises(ArgumentError) as caught:
            SequenceLayout.from_query_start_loc(on_device(OFFSETS), **host)
        assert caught.value.argument == argument

    @pytest.mark.parametrize("loc", [[0, 2], torch.zeros(2), torch.zeros(2, 2, dtype=torch.int32)])
    def test_what_is_no_query_start_loc_is_named(self, loc):
        with pytest.raises(ArgumentError) as caught:
            SequenceLayout.from_query_start_loc(loc, lengths=(2,))
        assert caught.value.argument == "query_start_loc"


class TestGraphLayout:
    def test_padding_has_no_tokens_and_no_slot(self):
        layout = SequenceLayout.padded(4)
        assert layout.cu_seqlens.tolist() == [0] * 5
        assert layout.slots.tolist() == [-1] * 4
        layout.update((3, 1), (7, 2))
        assert layout.cu_seqlens.tolist() == [0, 3, 4, 4, 4]
        assert layout.slots.tolist() == [7, 2, -1, -1]
        assert (layout.n, layout.tokens) == (2, 4)

    def test_the_tensors_stay_where_they_are(self):
        layout = SequenceLayout.padded(4, dtype=torch.int64)
        before = layout.cu_seqlens.data_ptr(), layout.slots.data_ptr()
        for lengths, slots in (((1, 2, 3, 4), (0, 1, 2, 3)), ((), ()), ((5,), torch.tensor([9]))):
            layout.update(lengths, slots)
            assert (layout.cu_seqlens.data_ptr(), layout.slots.data_ptr()) == before
            assert layout.cu_seqlens.diff().tolist() == [*lengths] + [0] * (4 - len(lengths))
            assert layout.slots.tolist() == [int(x) for x in slots] + [-1] * (4 - len(lengths))

    def test_slots_that_are_not_given_stay(self):
        layout = SequenceLayout.padded(2)
        layout.update((1, 1), (4, 5))
        layout.update((2, 1))
        assert layout.slots.tolist() == [4, 5]

    @pytest.mark.parametrize(
        ("lengths", "slots", "argument"),
        [
            ((1, 1, 1), None, "lengths"),
            ((9,), None, "lengths"),
            ((8, 8), None, "lengths"),
            ((-1,), None, "lengths"),
            ((1.5,), None, "lengths"),
            ((1, 1), (3,), "slots"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_is_written(self, lengths, slots, argument):
        layout = SequenceLayout.padded(2, max_length=8, max_tokens=12)
        layout.update((2, 3), (0, 1))
        with pytest.raises(ArgumentError) as caught:
            layout.update(lengths, slots)
        assert caught.value.argument == argument
        assert layout.cu_seqlens.tolist() == [0, 2, 5]
        assert layout.slots.tolist() == [0, 1]

    def test_impossible_limits(self):
        for limits in ({"max_n": -1}, {"max_n": 1, "max_length": -1}, {"max_n": 1, "max_tokens": -2}):
            with pytest.raises(ArgumentValueError):
                SequenceLayout.padded(**limits)
        with pytest.raises(ArgumentTypeError, match="dtype"):
            SequenceLayout.padded(1, dtype=torch.int16)

    def test_a_call_s_problem_promises_nothing_about_one_replay_s_lengths(self):
        case = CaseSpec("decode", (1,) * 4, h=1, hv=2, k=8, v=8)
        layout = SequenceLayout.padded(4, max_length=1)
        kwargs = {**make_inputs(case).kwargs, "cu_seqlens": layout}
        call = canonical_call(**kwargs)
        assert call.cu_seqlens is layout.cu_seqlens
        assert call.layout is None
        assert call.max_seqlen == 1
        too_many = SequenceLayout.padded(4, max_tokens=9)
        with pytest.raises(ArgumentValueError, match="max_tokens = 9"):
            canonical_call(**{**kwargs, "cu_seqlens": too_many})

    def test_layers_sharing_one_layout_see_every_update(self):
        """What a replayed graph does: the same arguments in the same places, other lengths and slots."""
        op, draw = registry.get("fused_sigmoid_gating"), random.Random(0)
        tokens, max_n = 12, 5
        case = CaseSpec("layer", (tokens,), h=1, hv=2, k=8, v=8, extra_slots=9)
        layers = [make_inputs(case, seed).kwargs for seed in range(3)]
        layout = SequenceLayout.padded(max_n, max_length=tokens, max_tokens=tokens)
        for _ in range(6):
            n = draw.randint(0, max_n)
            cuts = sorted(draw.randint(0, tokens) for _ in range(n))
            lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
            slots = [s if draw.random() < 0.8 else -1 for s in draw.sample(range(10), n)]
            layout.update(lengths, slots)
            for kwargs in layers:
                pool = kwargs["initial_state_source"].clone()
                alone = {**kwargs, "initial_state_source": pool, "cu_seqlens": SequenceLayout.from_lengths(lengths)}
                alone["initial_state_indices"] = torch.tensor(slots, dtype=torch.int32)
                expected = op(**alone)
                o = op(**{**kwargs, "cu_seqlens": layout, "initial_state_indices": layout.slots})
                assert torch.equal(o[:, : sum(lengths)], expected[:, : sum(lengths)])
                assert torch.equal(kwargs["initial_state_source"], pool)
