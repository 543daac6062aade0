import json
import sys

import pytest
from PIL import Image

from experiments.figures import figure3
from experiments.harness import length_cost


def run(monkeypatch, tmp_path, *arguments):
    out = tmp_path / 'folder' / 'figure.png'
    sizes = ['--heads', 2, '--head_width', 4, '--repeats', 1, '--out', out]
    monkeypatch.setattr(sys, 'argv', ['figure3', *map(str, [*sizes, *arguments])])
    figure3.main()
    return out


def test_every_line_goes_as_far_as_the_limits_let_it(monkeypatch, tmp_path, capsys):
    names = ('dense', 'combiner_fixed')
    out = run(
        monkeypatch, tmp_path, '--names', ','.join(names), '--lengths', '64,16,512', '--gigabytes', 1e-3, '--core'
    )
    document = json.loads(out.with_suffix('.json').read_text())
    assert document['device']
    assert [(row['name'], row['length']) for row in document['rows']] == [
        *(('dense', length) for length in (16, 64)),
        *(('combiner_fixed', length) for length in (16, 64, 512)),
    ]
    assert all(row['ms'] > 0 and row['mb'] > 0 for row in document['rows'])
    assert 'dense stops at 512 tokens: it would need' in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100


def test_time_is_foreseen_by_its_growth():
    rows = [{'length': 1000, 'ms': 10.0}, {'length': 2000, 'ms': 40.0}]
    assert length_cost.predicted_seconds(rows, 8000) == pytest.approx(0.64)
    assert length_cost.predicted_seconds(rows[:1], 8000) == 0


def test_what_cannot_be_measured_is_said(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match='nothing could be measured'):
        run(monkeypatch, tmp_path, '--names', 'combiner_routing', '--lengths', '16', '--core')
    assert 'combiner_routing stops at 16 tokens: ' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, '--names', 'combiner_fixd')
    assert "did you mean 'combiner_fixed'" in capsys.readouterr().err


def test_the_papers_five_are_measured_without_being_asked_for(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['figure3'])
    options = length_cost.parse(figure3.PAPERS, figure3.LENGTHS, None, 'figure3.png')
    assert options.names == ['dense', *figure3.PAPERS]
    assert options.lengths[-1] == 65_536
