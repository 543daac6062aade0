import json
import sys

import pytest
from PIL import Image

from experiments.harness import recall_figure


def table(*models):
    def run(seed):
        values = {'all': 0.5, 'distance 4–7': 0.9 + seed / 100, 'distance 8–15': 0.4}
        return {'seed': seed, 'dataset': 'recall', 'evaluations': values}

    rows = [{'model': model, 'metric': 'accuracy', 'runs': [run(0), run(2)]} for model in models]
    return {'name': 'recall', 'rows': [*rows, {'model': 'axial', 'metric': 'accuracy', 'runs': []}]}


def test_the_accuracies_of_all_seeds_by_distance():
    found = recall_figure.by_distance(table('full')['rows'][0])
    assert list(found) == ['4–7', '8–15']
    assert found['4–7'] == pytest.approx([90, 92])


def test_a_panel_for_full_support_and_one_for_the_others():
    left, right = recall_figure.figure(table('full', 'combiner_fixed', 'fixed')).axes
    shown = [{text.get_text() for text in ax.texts} for ax in (left, right)]
    assert shown == [{'full', 'combiner_fixed'}, {'fixed'}]
    assert left.lines[0].get_ydata() == pytest.approx([91, 40])


def test_bars_end_at_0_and_at_100():
    rows = table('full')['rows'][:1]
    rows[0]['runs'] = [
        {'seed': seed, 'dataset': 'recall', 'evaluations': {'distance 4–7': value, 'distance 8–15': 1 - value}}
        for seed, value in enumerate((0.99, 0.5, 0.98))
    ]
    (ax, _) = recall_figure.figure({'name': 'recall', 'rows': rows}).axes
    (bars,) = ax.collections
    heights = [path.vertices[:, 1] for path in bars.get_paths()]
    assert max(map(max, heights)) == pytest.approx(100)
    assert min(map(min, heights)) == pytest.approx(0)


def test_command(monkeypatch, tmp_path, capsys):
    path, out = tmp_path / 'recall.json', tmp_path / 'folder' / 'recall.png'
    monkeypatch.setattr(sys, 'argv', ['recall', '--table', str(path), '--out', str(out)])
    path.write_text(json.dumps(table()))
    with pytest.raises(SystemExit):
        recall_figure.command(None)
    assert 'no run of recall is finished; run python -m experiments.tables.recall' in capsys.readouterr().err
    path.write_text(json.dumps(table('full')))
    recall_figure.command(None)
    with Image.open(out) as picture:
        assert picture.width > picture.height > 100
