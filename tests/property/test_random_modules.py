"""Folding changes nothing of models made of the layers that people write."""

from __future__ import annotations

from collections import Counter

import pytest

from .modules import FAMILIES, errors, random_model


@pytest.mark.parametrize("number", range(10))
def test_folding_changes_nothing(number: int) -> None:
    wide, narrow = errors(number, 3, Counter())
    assert wide <= 1 and narrow <= 1, random_model(number, 3).words


def test_the_same_number_gives_the_same_model() -> None:
    first, second = random_model(5, 3), random_model(5, 3)
    assert first.words == second.words and str(first.model) == str(second.model)
    assert all((a == b).all() for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_every_family_is_drawn() -> None:
    drawn = Counter(type(random_model(number, 3).model) for number in range(30))
    assert set(drawn) == set(FAMILIES.values())
