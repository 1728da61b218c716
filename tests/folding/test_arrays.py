"""Numbers per channel follow a tensor through its reshapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.folding.arrays import CannotCarry, collapse_equal, keep_axis, reshape


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_reshape_agrees_with_reshaping_the_whole_tensor(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=6))

    def shape() -> tuple[int, ...]:
        """Any shape with the product of the factors, in order: neighbours are merged at random, ones put in."""
        sizes = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return tuple(sizes)

    old, new = shape(), shape()
    kept = [data.draw(st.booleans()) for _ in old]
    numbers = np.random.default_rng(0).normal(size=[size if keep else 1 for size, keep in zip(old, kept, strict=True)])
    result = reshape(numbers, old, new, collapse_equal)
    np.testing.assert_array_equal(np.broadcast_to(result, new), np.broadcast_to(numbers, old).reshape(new))


def test_channels_that_split_into_heads() -> None:
    numbers = np.arange(6.0).reshape(1, 1, 6)
    assert reshape(numbers, (5, 7, 6), (5, 7, 3, 2), collapse_equal).shape == (1, 1, 3, 2)


def test_positions_keep_one_number_when_they_merge_with_the_batch() -> None:
    numbers = np.arange(6.0).reshape(1, 1, 6)
    assert reshape(numbers, (5, 7, 6), (35, 6), collapse_equal).shape == (1, 6)


def test_variation_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(CannotCarry):
        collapse_equal(np.arange(3.0), (0,))
    with pytest.raises(CannotCarry):
        keep_axis(np.arange(6.0).reshape(2, 3), -1, 3, collapse_equal)
    assert keep_axis(np.ones((2, 1)), -1, 3, collapse_equal).shape == (3,)
