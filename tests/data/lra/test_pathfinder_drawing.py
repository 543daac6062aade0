import numpy as np
import pytest

from combiner.data.lra import pathfinder_drawing as drawing


def offsets(canvas: np.ndarray) -> np.ndarray:
    """(row, column) of every cell, from the middle one."""
    reach = len(canvas) // 2
    return np.stack(np.mgrid[-reach : reach + 1, -reach : reach + 1], -1)


@pytest.mark.parametrize('degrees', [0, 37, 90, 135, 180, 271])
@pytest.mark.parametrize(('length', 'thickness', 'margin'), [(2, 0.5, 1), (5, 1.5, 3)])
def test_a_paddle_lies_in_its_direction(degrees, length, thickness, margin):
    stamp = drawing.paddle(degrees, length, thickness, margin)
    assert stamp.ink.max() == 1
    assert stamp.ink.min() == 0
    centre = (stamp.ink[..., None] * offsets(stamp.ink)).sum((0, 1)) / stamp.ink.sum()
    np.testing.assert_allclose(centre, np.multiply(length / 2, drawing.step(degrees)), atol=0.3)


@pytest.mark.parametrize('degrees', range(0, 360, 30))
@pytest.mark.parametrize(('length', 'thickness', 'margin'), [(2, 0.5, 1), (5, 1.5, 2)])
def test_its_room_is_wider_by_the_margin(degrees, length, thickness, margin):
    stamp = drawing.paddle(degrees, length, thickness, margin)
    line = np.linspace(0, length, 50)[:, None] * drawing.step(degrees)
    distance = np.linalg.norm(offsets(stamp.room)[:, :, None] - line, axis=-1).min(-1)
    assert (stamp.room[distance < margin] > 0.5).all()
    assert (stamp.room[distance > margin + thickness + 1] < 0.2).all()
    inner = stamp.wide[margin:-margin, margin:-margin]
    assert (inner >= stamp.room).all()


def test_directions_are_steps_of_length_one():
    np.testing.assert_allclose(drawing.step(0), (0, 1), atol=1e-12)
    np.testing.assert_allclose(drawing.step(90), (1, 0), atol=1e-12)
    np.testing.assert_allclose(drawing.step(225), (-(0.5**0.5), -(0.5**0.5)))


@pytest.mark.parametrize('radius', [1, 2, 3])
def test_widen_is_the_greatest_value_around(radius):
    canvas = np.random.default_rng(0).random((9, 7), np.float32)
    rows, columns = np.mgrid[:9, :7]
    for row, column in np.ndindex(9, 7):
        near = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
        assert drawing.widen(canvas, radius)[row, column] == canvas[near].max()


@pytest.mark.parametrize(('radius', 'area'), [(1.5, 7.1), (3.0, 28.3), (5.0, 78.5)])
def test_a_marker_is_a_disc(radius, area):
    ink = drawing.marker(radius)
    np.testing.assert_allclose(ink, ink.T, atol=0.05)
    np.testing.assert_allclose(ink, ink[::-1], atol=0.05)
    assert ink.max() == 1
    assert ink.sum() == pytest.approx(area, rel=0.25)


def test_a_stamp_brightens_and_never_darkens():
    canvas = np.full((9, 9), 0.5, np.float32)
    drawing.stamp_on(canvas, np.array([[0, 0.2, 0], [0.2, 1, 0.7], [0, 0, 0]], np.float32), 4, 5)
    changed = np.argwhere(canvas != 0.5).tolist()
    assert changed == [[4, 5], [4, 6]]
    assert canvas[4, 6] == np.float32(0.7)
