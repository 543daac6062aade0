"""The figures of the paper, drawn from what is registered."""

import importlib
import sys

import numpy as np
import pytest
from PIL import Image

from combiner import patterns
from combiner.attention import combiner_axial_rowmajor, combiner_fixed
from experiments.figures import figure1, figure2
from experiments.harness import pattern_figure

PAPERS = (
    'fixed',
    'logsparse',
    'axial',
    'combiner_fixed',
    'combiner_logsparse',
    'combiner_axial_vertical',
    'combiner_axial_horizontal',
    'combiner_axial_rowmajor',
)


def test_every_panel_of_the_paper_is_drawn():
    drawn = [pattern_figure.panels(names, 16) for names in (figure1.PANELS, figure2.PAPERS_PANELS)]
    titles = list(dict.fromkeys(title.partition(' ')[2] for panels in drawn for title in panels))
    assert titles == list(PAPERS)


def test_a_panel_keeps_its_letter_and_takes_square_grids_and_blocks():
    panels = pattern_figure.panels(('fixed', 'not_there', 'combiner_axial_rowmajor'), 16)
    assert list(panels) == ['(A) fixed', '(C) combiner_axial_rowmajor']
    expected = combiner_axial_rowmajor.pattern(16, causal=True, columns=4)
    np.testing.assert_array_equal(panels['(C) combiner_axial_rowmajor'].direct, expected.direct)


def test_what_needs_clusters_is_drawn_with_random_ones():
    (panel,) = pattern_figure.panels(('combiner_routing',), 16).values()
    np.testing.assert_array_equal(panel.coverage(), patterns.support(16, causal=True))


def test_a_cell_is_direct_or_in_a_span_or_not_reached():
    pattern = combiner_fixed.pattern(6, causal=True, block=2)
    assert pattern_figure.classes(pattern).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [2, 2, 1, 0, 0, 0],
        [2, 2, 1, 1, 0, 0],
        [2, 2, 3, 3, 1, 0],
        [2, 2, 3, 3, 1, 1],
    ]


def test_a_mixture_has_a_panel_for_each_part():
    parts = tuple(combiner_fixed.pattern(8, causal=True, block=block) for block in (2, 4))
    panels = pattern_figure.parts_by_title('mixed', patterns.Mixture(parts))
    assert list(panels) == ['mixed, 1 of 2', 'mixed, 2 of 2']
    assert panels['mixed, 2 of 2'] is parts[1]
    assert len(pattern_figure.figure({'mixed': patterns.Mixture(parts)}, 'heading').axes) == 2


@pytest.mark.parametrize('name', ['figure1', 'figure2'])
def test_the_command(monkeypatch, tmp_path, name):
    out = tmp_path / 'folder' / 'figure.png'
    monkeypatch.setattr(sys, 'argv', [name, '--length', '16', '--bidirectional', '--out', str(out)])
    importlib.import_module(f'experiments.figures.{name}').main()
    with Image.open(out) as picture:
        assert picture.width > 100


def test_a_length_without_positions_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['figure1', '--length', '0'])
    with pytest.raises(SystemExit):
        figure1.main()
    assert 'length must be at least 1, got 0' in capsys.readouterr().err
