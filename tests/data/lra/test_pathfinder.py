import functools
import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from combiner.data.lra import pathfinder

# What is quick enough to draw many of.
QUICK = [(32, 'easy'), (32, 'intermediate'), (32, 'hard'), (64, 'easy'), (128, 'easy'), (256, 'hard')]
quick = pytest.mark.parametrize(('size', 'difficulty'), QUICK)


def draw(size: int, difficulty: str, count: int, seed: int = 0) -> list[pathfinder.Picture]:
    settings = pathfinder.parameters(size, difficulty)
    return [pathfinder.generate(np.random.default_rng([seed, index]), settings) for index in range(count)]


@functools.cache
def some(size: int, difficulty: str) -> list[pathfinder.Picture]:
    return draw(size, difficulty, 8)


def crosses(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two line segments share a point other than by touching."""

    def side(segment, point):
        along, to = segment[1] - segment[0], point - segment[0]
        return along[0] * to[1] - along[1] * to[0]

    return all(side(a, b[0]) * side(a, b[1]) < 0 for a, b in ((one, other), (other, one)))


def connected(paddles: np.ndarray, markers: np.ndarray, length: int, reach: float, least_cosine: float) -> bool:
    """Whether a way over `length` paddles leads from one marker to the other; knows nothing of snakes.

    It goes on from the far end of a paddle to any that begins within reach and turns by no more than allowed.
    """
    ends = np.concatenate([paddles, paddles[:, ::-1]])  # every paddle, both ways
    along = ends[:, 1] - ends[:, 0]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    gaps = np.linalg.norm(ends[:, None, 1] - ends[None, :, 0], axis=-1)
    ways = [np.flatnonzero(row).tolist() for row in (gaps <= reach) & (along @ along.T >= least_cosine)]
    first, last = (np.linalg.norm(ends[:, side] - markers[side], axis=1) < 0.1 for side in (0, 1))

    def walk(at: int, used: set[int]) -> bool:
        if len(used) == length:
            return last[at]
        return any(walk(to, used | {to % len(paddles)}) for to in ways[at] if to % len(paddles) not in used)

    return any(walk(at, {at % len(paddles)}) for at in np.flatnonzero(first).tolist())


def statistics(picture: pathfinder.Picture) -> list[float]:
    """Statistics that might predict the label without following any path."""
    size = len(picture.image)
    distance = float(np.linalg.norm(picture.markers[0] - picture.markers[1]))
    border = np.minimum(picture.markers, size - 1 - picture.markers).min(1)
    counts = np.bincount(picture.image.ravel() // 16, minlength=16)
    brightness = picture.image.sum(dtype=float)
    return [distance, distance**2, *border, border.min(), *picture.markers.ravel(), brightness, *counts]


@quick
def test_geometry_is_that_of_two_long_and_several_short_snakes(size, difficulty):
    settings = pathfinder.parameters(size, difficulty)
    for picture in some(size, difficulty):
        assert [len(snake) for snake in picture.snakes] == [settings.contour_length] * 2
        assert {len(snake) for snake in picture.distractors} <= {settings.contour_length // 3}
        assert 0 < len(picture.distractors) <= settings.distractors
        for snake in (*picture.snakes, *picture.distractors):
            along = snake[:, 1] - snake[:, 0]
            np.testing.assert_allclose(np.linalg.norm(along, axis=1), settings.paddle_length, rtol=1e-5)
            gaps = np.linalg.norm(snake[1:, 0] - snake[:-1, 1], axis=1)
            assert (gaps <= 2 * max(settings.margins) + 1.5).all()
            cosines = (along[1:] * along[:-1]).sum(1) / settings.paddle_length**2
            assert (cosines > np.cos(np.radians(90 / settings.continuity + 2))).all()
            assert (settings.padding <= snake).all()
            assert (snake <= size - 1 - settings.padding).all()
        starts = np.stack([snake[0, 0] for snake in picture.snakes])
        assert np.linalg.norm(starts[0] - starts[1]) == pytest.approx(settings.seed_distance, abs=0.75)
        assert (2 * settings.seed_distance <= starts[0]).all()
        assert (starts[0] < size - 2 * settings.seed_distance).all()


@quick
def test_the_label_says_whether_one_snake_connects_the_markers(size, difficulty):
    for picture in some(size, difficulty):
        begins = [tuple(snake[0, 0]) == tuple(picture.markers[0]) for snake in picture.snakes]
        ends = [tuple(snake[-1, 1]) == tuple(picture.markers[1]) for snake in picture.snakes]
        assert sum(begins) == sum(ends) == 1
        assert picture.label == (begins == ends)


@quick
def test_no_paddles_cross(size, difficulty):
    for picture in some(size, difficulty):
        paddles = np.concatenate([*picture.snakes, *picture.distractors])
        assert not any(crosses(one, other) for one, other in itertools.combinations(paddles, 2))


@pytest.mark.parametrize(
    ('size', 'difficulty', 'count'), [(32, 'intermediate', 60), (128, 'easy', 60), (256, 'hard', 25)]
)
def test_whoever_follows_the_paddles_finds_the_label(size, difficulty, count):
    """Connected markers always are; where paddles lie close, a way over those of others may join the rest by chance."""
    settings = pathfinder.parameters(size, difficulty)
    reach, least_cosine = 2 * max(settings.margins) + 1.5, np.cos(np.radians(90 / settings.continuity + 2))
    found = {0: [], 1: []}
    for index, picture in enumerate(draw(size, difficulty, count)):
        paddles = np.concatenate([*picture.snakes, *picture.distractors])
        paddles = np.random.default_rng(index).permutation(paddles)
        way = connected(paddles, picture.markers, settings.contour_length, reach, least_cosine)
        found[picture.label].append(way)
    assert all(found[1])
    assert np.mean(found[0]) <= (0.15 if size == 32 else 0.05)


def test_only_snakes_and_markers_are_visible():
    for picture in draw(32, 'intermediate', 10):
        image = picture.image
        assert (image.dtype, image.shape, image.min(), image.max()) == (np.uint8, (32, 32), 0, 255)
        points = [np.linspace(*ends, 9) for ends in np.concatenate([*picture.snakes, *picture.distractors])]
        for row, column in np.rint(np.concatenate([*points, picture.markers])).astype(int):
            image = image.copy()
            image[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = 0
        assert not image.any()
        assert (picture.image == 0).mean() > 0.4


def test_brightness_of_snakes_distractors_and_markers():
    """At 32x32: markers 1, long snakes 1.5, short ones 2 times as bright, of which the brightest cell has 255."""
    for picture in draw(32, 'easy', 20):
        image = picture.image.astype(int)
        brightest = []
        for ends in np.concatenate([*picture.snakes, *picture.distractors]):
            points = np.rint(np.linspace(*ends, 9)).astype(int)
            brightest.append(image[points[:, 0], points[:, 1]].max())
        long, short = np.split(np.array(brightest), [2 * 6])
        assert np.median(long) == pytest.approx(191, abs=10)
        assert np.median(short) == pytest.approx(255, abs=10)
        assert (brightest >= np.repeat([150, 200], [len(long), len(short)])).all()
        for row, column in picture.markers:
            around = image[row - 1 : row + 2, column - 1 : column + 2]
            assert around.min() == pytest.approx(100, abs=30)


def test_a_picture_follows_from_its_generator_alone():
    one, same, other = (draw(32, 'hard', 1, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.image, same.image)
    assert one.label == same.label
    assert (one.image != other.image).any()


def test_the_label_changes_nothing_but_the_second_marker():
    """Both labels come from one procedure: what is drawn first of all is the label."""

    class Choosing(np.random.Generator):
        def __init__(self, label):
            super().__init__(np.random.PCG64(5))
            self.label = label

        def integers(self, *arguments, **options):
            drawn = super().integers(*arguments, **options)
            label, self.label = self.label, None
            return drawn if label is None else label

    zero, one = (pathfinder.generate(Choosing(label), pathfinder.parameters(32, 'easy')) for label in (0, 1))
    assert (zero.label, one.label) == (0, 1)
    for before, after in zip(zero.snakes + zero.distractors, one.snakes + one.distractors, strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(zero.markers[0], one.markers[0])
    assert (zero.markers[1] != one.markers[1]).any()


def test_labels_are_balanced():
    labels = [picture.label for picture in draw(32, 'intermediate', 200)]
    assert np.mean(labels) == pytest.approx(0.5, abs=0.1)


def test_settings_of_the_benchmark():
    settings = pathfinder.parameters(32, 'intermediate')
    assert (settings.contour_length, settings.distractor_length, settings.distractors) == (9, 3, 6)
    assert [pathfinder.parameters(32, name).distractors for name in pathfinder.DIFFICULTIES] == [10, 6, 5]
    path_x = pathfinder.parameters(128, 'hard')
    assert (path_x.contour_length, path_x.margins, path_x.distractors, path_x.evenness) == (14, (2, 3), 8, None)


@pytest.mark.parametrize('size', [12, 16])
def test_the_smallest_have_two_snakes_of_two_paddles_and_nothing_else(size):
    for picture in draw(size, 'easy', 20):
        assert picture.image.shape == (size, size)
        assert [len(snake) for snake in picture.snakes] == [2, 2]
        assert picture.distractors == []


def test_at_size_12_the_markers_are_the_brightest():
    for picture in draw(12, 'easy', 20):
        assert set(map(tuple, np.argwhere(picture.image > 200))) == set(map(tuple, picture.markers))


@pytest.mark.parametrize(
    ('size', 'difficulty', 'match'),
    [
        (8, 'easy', 'size 8; known: 12, 16, 32'),
        (32, 'x', "'x'; known"),
        (16, 'hard', 'size 16 has no difficulty hard; choose easy'),
    ],
)
def test_unknown_settings(size, difficulty, match):
    with pytest.raises(ValueError, match=match):
        pathfinder.parameters(size, difficulty)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('size', 'difficulty', 'count'),
    [
        (32, 'easy', 6000),
        (32, 'intermediate', 6000),
        (32, 'hard', 4000),
        (64, 'easy', 2000),
        (128, 'easy', 2000),
        (256, 'easy', 1000),
    ],
)
def test_statistics_do_not_predict_the_label(size, difficulty, count):
    assert told_by_statistics(size, difficulty, count) < 0.65


@pytest.mark.slow
def test_statistics_predict_many_labels_of_the_smallest():
    """As the module and docs/results.md say."""
    assert 0.8 < told_by_statistics(16, 'easy', 4000) < 0.9
    assert 0.6 < told_by_statistics(12, 'easy', 4000) < 0.75


def told_by_statistics(size, difficulty, count):
    """The share of labels that a logistic regression finds, on the half that it was not fitted to."""
    pictures = draw(size, difficulty, count, seed=5)
    labels = np.array([picture.label for picture in pictures])
    numbers = np.array([statistics(picture) for picture in pictures])
    half = count // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
    model.fit(numbers[:half], labels[:half])
    assert labels.mean() == pytest.approx(0.5, abs=0.05)
    return model.score(numbers[half:], labels[half:])
