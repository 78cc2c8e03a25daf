"""From a contest to an entry: times that compare although the host's speed changed while they were taken."""

from __future__ import annotations

import pytest

from isokern.autotune.contest import Standing
from isokern.autotune.policy import PromotionPolicy
from isokern.autotune.publish import typical_seconds
from isokern.autotune.race import RaceResult
from isokern.autotune.samples import BlockTable
from isokern.autotune.screen import ScreenResult


def standing(blocks=(), **screened):
    table = BlockTable()
    for block in blocks:
        table.append(block)
    race = RaceResult(("a", "b"), None, ("a",), {}, {}, table, None, 0, 0, 1.0, PromotionPolicy()) if blocks else None
    medians = {name: times[0] for name, times in screened.items()}
    return Standing(ScreenResult(tuple(screened), {}, medians, screened) if screened else None, race, {}, 1, "?")


SLOWING = [{"a": 10.0, "b": 11.0}] * 5 + [{"a": 20.0}] * 20


def test_the_winner_has_its_median():
    assert typical_seconds(standing(SLOWING), "a", "a") == 20.0


def test_who_left_the_race_early_has_what_it_took_beside_the_winner():
    """Its own median is of the fast half: 11, which would make it look almost twice as fast as the winner."""
    assert typical_seconds(standing(SLOWING), "b", "a") == pytest.approx(22.0)


def test_so_has_who_never_raced_by_the_passes_of_the_screen():
    found = standing(SLOWING, a=(10.0, 10.0, 12.0), c=(9.0, 9.0, 10.8))
    assert typical_seconds(found, "c", "a") == pytest.approx(18.0)


def test_who_was_abandoned_has_the_passes_that_it_was_in():
    found = standing(SLOWING, a=(10.0, 10.0, 30.0), c=(40.0, 40.0))
    assert typical_seconds(found, "c", "a") == pytest.approx(80.0)


def test_without_anything_in_common_a_median_is_all_there_is():
    assert typical_seconds(standing(c=(7.0, 8.0, 9.0)), "c", "a") == 8.0
