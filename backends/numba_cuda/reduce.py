"""Sums over K across the lanes of a group, by shuffles: every lane gets the predictions, each output one lane.

Lanes half the group apart are added first, then a quarter, ...: the upper part of the tree of ``registers``. While a
lane has several columns' outputs, it keeps half of them and passes on the rest, so that an output costs fewer shuffles
than a prediction.
"""

from __future__ import annotations

from typing import Any

from .target import Function, Target
from .variant import Variant

__all__ = ["held_column", "idle_bits", "reduce_both", "reduce_outputs", "reduce_predictions"]

#: log2 of a warp.
_MOST_STAGES = 5


def _stages(variant: Variant) -> tuple[int, int]:
    """Stages in which lanes share out columns, and further stages in which they only add."""
    lanes, columns = variant.lanes.bit_length() - 1, variant.columns.bit_length() - 1
    sharing = min(lanes, columns)
    return sharing, lanes - sharing


def held_column(variant: Variant, target: Target) -> Function:
    """``lane in group -> first column`` whose output it holds after the reduction."""
    lanes, columns = variant.lanes, variant.columns
    sharing, _ = _stages(variant)

    @target.index
    def column(j: Any) -> Any:
        at = 0
        for stage in range(sharing):
            if j & (lanes >> (stage + 1)):
                at += columns >> (stage + 1)
        return at

    return column


def idle_bits(variant: Variant) -> int:
    """Bits that are 0 in the number of a lane in its group that stores: of lanes ending with one column, the first."""
    return (1 << _stages(variant)[1]) - 1


def reduce_predictions(variant: Variant, target: Target) -> Function:
    """``(predictions, received)``: every lane ends with every column's prediction."""
    columns, lanes = variant.columns, variant.lanes
    stages = lanes.bit_length() - 1
    exchange = target.exchange(columns)

    @target.device
    def reduce(predictions: Any, received: Any) -> Any:
        for stage in range(stages):
            exchange(predictions, lanes >> (stage + 1), received)
            for r in range(columns):
                predictions[r] += received[r]

    return reduce


def reduce_outputs(variant: Variant, target: Target) -> Function:
    """``(j, outputs, sent, received)``: each lane ends with the columns from ``held_column`` on, in ``outputs[0:]``."""
    steps = [_output_stage(variant, target, stage, with_predictions=False) for stage in range(_stage_count(variant))]
    steps += [_no_stage(target)] * (_MOST_STAGES - len(steps))
    first, second, third, fourth, fifth = steps

    @target.device
    def reduce(j: Any, outputs: Any, sent: Any, received: Any) -> Any:
        first(j, outputs, outputs, sent, received)
        second(j, outputs, outputs, sent, received)
        third(j, outputs, outputs, sent, received)
        fourth(j, outputs, outputs, sent, received)
        fifth(j, outputs, outputs, sent, received)

    return reduce


def reduce_both(variant: Variant, target: Target) -> Function:
    """``(j, predictions, outputs, sent, received)``: both, stage by stage: a stage's shuffles go out together."""
    steps = [_output_stage(variant, target, stage, with_predictions=True) for stage in range(_stage_count(variant))]
    steps += [_no_stage(target)] * (_MOST_STAGES - len(steps))
    first, second, third, fourth, fifth = steps

    @target.device
    def reduce(j: Any, predictions: Any, outputs: Any, sent: Any, received: Any) -> Any:
        first(j, predictions, outputs, sent, received)
        second(j, predictions, outputs, sent, received)
        third(j, predictions, outputs, sent, received)
        fourth(j, predictions, outputs, sent, received)
        fifth(j, predictions, outputs, sent, received)

    return reduce


def _stage_count(variant: Variant) -> int:
    return variant.lanes.bit_length() - 1


def _no_stage(target: Target) -> Function:
    @target.device
    def nothing(j: Any, predictions: Any, outputs: Any, sent: Any, received: Any) -> Any:
        pass

    return nothing


def _output_stage(variant: Variant, target: Target, stage: int, with_predictions: bool) -> Function:
    """One stage for the outputs, and for the predictions as well if asked for.

    A function per stage: the number of outputs shrinks from stage to stage, and a loop over stages would index
    registers by something the compiler need not see through.
    """
    sharing, _ = _stages(variant)
    mask = variant.lanes >> (stage + 1)
    kept = variant.columns >> (stage + 1) if stage < sharing else max(1, variant.columns >> sharing)
    shares = stage < sharing
    beside = variant.columns if with_predictions else 0
    exchange = target.exchange(beside + kept)

    @target.device
    def one(j: Any, predictions: Any, outputs: Any, sent: Any, received: Any) -> Any:
        for r in range(beside):
            sent[r] = predictions[r]
        if shares:
            upper = (j & mask) != 0
            for i in range(kept):
                low, high = outputs[i], outputs[kept + i]
                sent[beside + i] = low if upper else high
                outputs[i] = high if upper else low
        else:
            for i in range(kept):
                sent[beside + i] = outputs[i]
        exchange(sent, mask, received)
        for r in range(beside):
            predictions[r] += received[r]
        for i in range(kept):
            outputs[i] += received[beside + i]

    return one
