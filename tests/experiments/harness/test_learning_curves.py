import json

import finished
import pytest

from experiments.harness import learning_curves

ROWS = [finished.row('Full'), finished.row('Full', 'Larger'), finished.row('Fixed')]


def validated(folder, seeds):
    """Runs with two validations each, of which nothing but these is there."""
    planned = [finished.run(row, folder, seed) for row in ROWS for seed in range(seeds)]
    for run in planned:
        run.workdir.mkdir(parents=True)
        lines = [f'{{"step": {step}, "validation_bits_per_dim": {9 - step + run.seed**2}}}' for step in (1, 2)]
        (run.workdir / 'metrics.jsonl').write_text('\n'.join(lines))
    return planned


def test_curves_are_the_median_and_the_range_of_seeds(tmp_path):
    curves = learning_curves.of_runs(validated(tmp_path, 3))
    table = json.loads(json.dumps({'rows': [vars(row) for row in ROWS], 'curves': curves}))  # as it comes from a file
    figure = learning_curves.figure(table)
    assert [ax.get_title(loc='left') for ax in figure.axes] == ['Photos', 'Larger']
    full, fixed = figure.axes[0].lines
    assert full.get_ydata() == pytest.approx([9, 8])
    assert full.get_color() != fixed.get_color()
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (7, 12)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['Full', 'Fixed']


def test_a_curve_names_the_seeds_that_reached_a_step(tmp_path):
    planned = validated(tmp_path, 2)
    (planned[0].workdir / 'metrics.jsonl').write_text('{"step": 1, "validation_bits_per_dim": 7.5}')
    curve = learning_curves.of_runs(planned)[0]
    assert (curve['validation'], curve['seeds']) == ([[7.5, 9], [8]], [[0, 1], [1]])
    assert learning_curves.points_of(curve) == {1: {0: 7.5, 1: 9}, 2: {1: 8}}


def test_without_curves_there_is_no_figure():
    rows = [vars(row) for row in ROWS]
    assert learning_curves.figure({'rows': rows}) is learning_curves.figure({'rows': rows, 'curves': []}) is None
