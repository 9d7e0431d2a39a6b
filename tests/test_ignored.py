"""Ignored pixels: rows as in a slice, masks at the images' size, any grid by exact integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cada_deploy.errors import UsageError
from cada_deploy.ignored import IgnoredArea, MaskSizeError, parse_rows

ROWS = st.one_of(st.none(), st.integers(-30, 30))


@given(st.integers(1, 20), st.lists(st.tuples(ROWS, ROWS), max_size=3))
def test_rows_mean_what_a_slice_means(
    height: int, rows: list[tuple[int | None, int | None]]
) -> None:
    area = IgnoredArea(rows=tuple(rows)).on_grid((height, 3), (height, 3))
    expected = {y for start, stop in rows for y in range(height)[start:stop]}
    if not rows:
        assert area is None
    else:
        assert area is not None and (area != 0).all(axis=1).tolist() == [
            y in expected for y in range(height)
        ]


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 10**6),
)
def test_a_grid_pixel_takes_the_image_pixel_under_its_centre(
    image: tuple[int, int], grid: tuple[int, int], seed: int
) -> None:
    mask = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, image, np.uint8)
    area = IgnoredArea(mask).on_grid(image, grid)
    assert area is not None and area.shape == grid and area.flags.c_contiguous
    under = [
        [int(Fraction(2 * k + 1, 2) * Fraction(image[axis], grid[axis])) for k in range(grid[axis])]
        for axis in (0, 1)
    ]
    assert (area == mask[np.ix_(*under)]).all()


def test_a_mask_of_another_size_names_both_sizes() -> None:
    area = IgnoredArea(np.zeros((4, 6), np.uint8))
    with pytest.raises(MaskSizeError, match=r"5x6.*4x6"):
        area.on_grid((5, 6), (5, 6))


def test_using_the_area_does_not_change_the_mask() -> None:
    mask = np.zeros((4, 6), np.uint8)
    area = IgnoredArea(mask, ((0, 2),)).on_grid((4, 6), (4, 6))
    assert area is not None and area[:2].all() and not area[2:].any()
    assert not mask.any()


def test_the_run_id_sees_which_pixels_not_which_values() -> None:
    ones = np.eye(3, dtype=np.uint8)
    assert IgnoredArea(ones).to_json() == IgnoredArea(ones * 200).to_json()
    assert IgnoredArea(ones).to_json() != IgnoredArea(1 - ones).to_json()
    # The same bytes in another shape are another mask.
    a, b = np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)
    assert IgnoredArea(a).to_json() != IgnoredArea(b).to_json()
    assert IgnoredArea().to_json() == {"mask": None, "rows": []}


def test_rows_are_parsed() -> None:
    assert parse_rows(("0:16", "-120:", ":3", "4:-1")) == (
        (0, 16),
        (-120, None),
        (None, 3),
        (4, -1),
    )


@pytest.mark.parametrize("text", ["", ":", "5", "a:b", "1:2:3", "1.5:3", "1;2", "0x5:9"])
def test_rows_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="START:STOP"):
        parse_rows((text,))
