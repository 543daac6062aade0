import base64
import hashlib
import json
import re

import finished
import pytest
import reported

from experiments.harness import run as runs
from experiments.harness.report import curves, page

ODD = reported.ODD


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    return tmp_path


def test_the_page_has_everything_and_loads_nothing(folder, monkeypatch, capsys):
    reported.folder_of(folder)
    monkeypatch.setattr('sys.argv', ['report', '--workdir', str(folder)])
    page.command(None)
    assert 'report.html, ' in capsys.readouterr().out
    text = (folder / 'report.html').read_text(encoding='utf-8')
    found = reported.Page(text)
    assert found.open == []
    sources = [attributes['src'] for _, attributes in found.elements if 'src' in attributes]
    assert len(sources) == 1 + 2 * 3 + 1  # samples, heads of two layers, the pattern
    for source in sources:
        kind, data = source.split(',')
        assert kind == 'data:image/png;base64'
        assert base64.b64decode(data).startswith(b'\x89PNG')
    links = {attributes['href'] for _, attributes in found.elements if attributes.get('href', '').strip()}
    identifiers = {attributes['id'] for _, attributes in found.elements if 'id' in attributes}
    assert {'#small-0', '#samples', '#attention'} <= links
    assert {link.removeprefix('#') for link in links} <= identifiers
    used = {attributes['href'] for tag, attributes in found.elements if tag == 'use'}
    assert used <= {f'#m{number}' for number in range(curves.MARKERS)}
    outside = re.sub(r'http://www\.w3\.org/2000/svg', '', text)  # a name, not an address
    assert not re.search(r'@import|url\(|https?:|<link|<iframe|\son\w+=', outside)
    assert 'Not shown' not in found.text


def test_a_browser_runs_no_other_script(folder):
    reported.folder_of(folder)
    found = reported.Page(page.page(folder))
    style, script = found.scripts
    policy = next(a['content'] for tag, a in found.elements if tag == 'meta' and 'http-equiv' in a)
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert script == page.SCRIPT.read_text(encoding='utf-8')
    assert "default-src 'none'" in policy
    assert not any('style' in attributes for _, attributes in found.elements)  # the policy forbids them
    assert len(script.splitlines()) <= 200


def test_the_numbers_are_those_of_the_file(folder):
    _, content = reported.folder_of(folder)
    found = reported.Page(page.page(folder))
    rows = {}
    for row in found.rows:
        rows.setdefault((row[0][0], len(row)), row)
    for row in content['rows'][:3]:
        _, published, ours, larger = rows[row['model'], 4]
        assert (float(published[1]), float(ours[1])) == (row['published'], row['ours']['mean'])
        assert published[0] == f'{row["published"]:.3f}'
        assert ours[0] == f'{row["ours"]["mean"]:.3f} ± {row["ours"]["interval"]:.3f}'
        assert larger == ['', None]
        cost = rows[row['model'], 12]
        names = ('seeds', 'steps', 'tokens', 'train_minutes', 'seconds_per_step', 'train_peak_memory_mb')
        assert [float(value) for _, value in cost[2:8]] == [row['ours'][name] for name in names]
        assert cost[-1][0] == 'abc'
    assert [value for _, value in rows['Fixed', 12][8:11]] == ['0.5', '9.25', '1']
    assert [text for text, _ in rows['Axial', 12][8:11]] == ['', '', '']
    assert ['3 of 4', '0.75'] in rows['small', 6]
    assert '1 table; 3 of 4 rows have a result.' in found.text


def test_the_curves_are_those_of_the_file(folder):
    _, content = reported.folder_of(folder)
    found = reported.Page(page.page(folder))
    keys = [attributes for tag, attributes in found.elements if tag == 'button' and 'data-points' in attributes]
    assert len(keys) == len(content['curves']) == 3
    assert [curve['steps'] for curve in content['curves']] == [[60, 100]] * 3
    for key, curve in zip(keys, content['curves'], strict=True):
        low, high = sorted(curve['validation'][1])
        expected = f'{(low + high) / 2:,.3f} ({low:,.3f}–{high:,.3f})'
        assert json.loads(key['data-points']) == {'60.0': '5.000 (5.000–5.000)', '100.0': expected}
    (chart,) = found.with_class('chart')
    assert json.loads(chart['data-x']) == [[60, '60.0', '60'], [100, '100.0', '100']]
    heights = [json.loads(line['data-y']) for line in found.with_class('line')]
    assert all(0 <= y <= 100 for line in heights for y in line)
    assert all(last > first for first, last in heights)  # lower values are further down


def test_values_without_a_number_leave_a_gap():
    lines = [curves.Line('a', curves.Style(1, 'solid'), {1.0: [float('nan')], 2.0: [2.0, float('inf')], 3.0: [9.0]})]
    labels = {1.0: '1', 2.0: '2', 3.0: '3'}
    arguments = {'unit': '', 'name': 'step', 'labels': labels, 'places': 1}
    text = curves.drawing('title', lines, **arguments, log=True)
    found = reported.Page(text)
    assert 'nan' not in text
    assert [(a['data-scale'], 'hidden' in a) for a in found.with_class('plot')] == [('linear', True), ('log', False)]
    (key,) = (a for _, a in found.elements if 'data-points' in a)
    assert json.loads(key['data-points']) == {'2.0': '2.0', '3.0': '9.0'}
    assert curves.drawing('title', [lines[0]._replace(points={1.0: [float('nan')]})], **arguments, log=True) == ''


def test_names_cannot_break_the_page(folder):
    planned, content = reported.folder_of(folder)
    content['name'] = content['scale'] = ODD
    for row in content['rows']:
        row['column'] = f'{ODD} {row["column"]}'
    for curve in content['curves']:
        curve['column'] = f'{ODD} {curve["column"]}'
    (folder / 'small.json').write_text(json.dumps(content))
    (planned[0].workdir / 'samples.png').rename(planned[0].workdir / 'samples_<b>&.png')
    found = reported.Page(page.page(folder))
    assert found.open == []
    assert ODD in found.text
    assert f'{ODD} Photos' in found.text
    assert not any(tag == 'b' and attributes for tag, attributes in found.elements)
    assert sum(tag == 'script' for tag, _ in found.elements) == 1
    assert sum(tag == 'b' for tag, _ in found.elements) == len(found.with_class('chart'))
    assert len(found.with_class('chart')) == 1
    assert any(text.startswith('<given> & sampled') for text in found.text)
    assert any('samples_<b>&' in text for text in found.text)


def damage_heads(workdir):
    (workdir / 'attention_map_1_0_head2.png').unlink()


def damage(name, content):
    return lambda workdir: (workdir / name).write_bytes(content)


@pytest.mark.parametrize(
    ('break_it', 'said'),
    [
        (damage('samples.png', b'GIF89a'), 'samples.png: samples.png is no PNG file'),
        (damage('samples.txt', b'\xff\xfe'), "samples.txt: 'utf-8' codec can't decode"),
        (damage('attention_map_0_0.json', b'{"image": '), 'attention_map_0_0.json: is no JSON file: Expecting'),
        (damage('attention_map_0_0.json', b'{}'), "attention_map_0_0.json: has no 'image'"),
        (damage('attention_map_0_0.json', b'[1]'), 'attention_map_0_0.json: '),
        (damage_heads, 'attention_map_1_0_head2.png'),
        (damage('../../../../../small.json', b'{"name": "small", "scale"'), 'small.json: is no JSON file'),
        (damage('../../../../../more.json', b'{"name": "a", "scale": "b", "rows": [{}]}'), "more.json: has no 'model'"),
        (
            damage('../../../../../more.json', b'{"name": "a", "scale": "b", "rows": 3}'),
            'more.json: its rows are no list',
        ),
    ],
)
def test_a_damaged_file_is_named_and_stops_nothing(folder, break_it, said):
    planned, _ = reported.folder_of(folder)
    break_it(planned[0].workdir)
    found = reported.Page(page.page(folder))
    assert found.open == []
    problems = [text for text in found.text if said in text]
    assert 'Not shown' in found.text
    assert len(problems) == 1, found.text
    assert 'Samples' in found.text
    assert ('small' in found.text) == ('small.json' not in said)


def test_a_part_of_a_table_that_is_damaged_leaves_the_others(folder):
    _, content = reported.folder_of(folder)
    del content['curves'][0]['steps']
    content['costs'][0]['rows'] = [{}]
    (folder / 'small.json').write_text(json.dumps(content))
    found = reported.Page(page.page(folder))
    assert "small.json: has no 'steps'" in found.text
    assert "small.json: has no 'column'" in found.text
    assert ['Fixed', None] in [row[0] for row in found.rows if len(row) == 4]


def test_a_table_of_an_earlier_version_has_its_picture_of_curves(folder):
    _, content = reported.folder_of(folder)
    del content['curves']
    (folder / 'small.json').write_text(json.dumps(content))
    found = reported.Page(page.page(folder))
    assert found.with_class('chart') == []
    captions = [text for text in found.text if text.startswith('A picture of an earlier version')]
    assert len(captions) == 1
    (folder / 'small.png').unlink()
    assert 'Learning curves' not in reported.Page(page.page(folder)).text


def test_everything_is_shown_without_the_script(folder):
    reported.folder_of(folder)
    found = reported.Page(page.page(folder))
    assert 'hidden' in found.with_class('sliders')[0]
    maps = found.with_class('map')
    assert [(a['data-layer'], a['data-head']) for a in maps] == [(str(x), str(y)) for x in range(2) for y in range(3)]
    assert not any('hidden' in a for a in maps)
    assert 'layer 1, head 2: rank 12, 25% of the weight direct' in found.text
    assert any('A pixel is the largest weight of 2 × 2 positions.' in text for text in found.text)


def test_a_mechanism_has_its_own_line_everywhere():
    found = curves.styles(['lab.own:Own', 'lab.own:Own'])
    assert len(set(found.values())) == len(found)
    assert found['full'] == curves.Style(0, 'solid')
    assert found['combiner_fixed'][0] == found['fixed'][0] != found['combiner_tree'][0]
    assert (found['combiner_fixed'].dash, found['fixed'].dash) == ('solid', 'dashed')
    assert {name for name, style in found.items() if style.dash == 'solid'} == {
        name for name in found if name.startswith('combiner_') or name == 'full'
    }
    assert {**curves.styles(), 'lab.own:Own': found['lab.own:Own']} == found
    rows = [('Six', 'attention=combiner_fixed,layers=6'), ('Twelve', 'attention=combiner_fixed+block=8,layers=12')]
    six, twelve = curves.of_rows(rows, found).values()
    assert six == found['combiner_fixed']
    assert twelve[:2] == six[:2]
    assert twelve.marker != six.marker


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report', '--workdir', str(tmp_path)])
    with pytest.raises(SystemExit):
        page.command(None)
    assert 'has no table and no picture of a run; give the --workdir' in capsys.readouterr().err
