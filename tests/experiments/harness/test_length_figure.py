import pytest

from experiments.harness import length_figure


@pytest.mark.parametrize(
    ('heights', 'expected'),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5, 0.5], [0.4, 0.5, 0.6]),
        ([0.52, 0.5, 0.9], [0.56, 0.46, 0.9]),
        ([1.0, 1.0, 0.95], [0.9, 1.0, 0.8]),
        ([0.0, 0.01], [0.0, 0.1]),
    ],
)
def test_labels_keep_apart(heights, expected):
    assert length_figure.spread(heights, 0.1) == pytest.approx(expected)
