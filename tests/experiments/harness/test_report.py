import base64
import json
import re
from html.parser import HTMLParser

import finished
import pytest
from PIL import Image

from experiments.harness import report, table
from experiments.harness import run as runs

VOID = {'meta', 'img'}


class Page(HTMLParser):
    """Elements that are open and never closed, all attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A table of one model, of which one column is not run, with samples and a picture of attention."""
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    rows = [finished.row('Fixed & <b>', published=3.325), finished.row('Fixed & <b>', 'Larger')]
    planned = [finished.run(row, tmp_path / 'small') for row in rows]
    assert runs.complete(planned[0], finished.Fake()) is None
    costs = {'model': 'Fixed & <b>', 'column': 'Photos', 'seconds_per_step': 0.5, 'memory_mb': 9, 'compile_seconds': 1}
    timed = {**finished.ENVIRONMENT, 'scale': 'quick', 'rounds': 5, 'rows': [costs]}
    (tmp_path / 'small_costs.json').write_text(json.dumps(timed))
    table.write_table('small', 'quick', planned, tmp_path)
    for name in ('samples.png', 'attention_map_0_1.png', 'checkpoints/samples.png'):
        path = planned[0].workdir / name
        path.parent.mkdir(exist_ok=True)
        Image.new('RGB', (2, 2), 'red').save(path)
    (tmp_path / 'other.json').write_text('{"rows": []}')
    (tmp_path / 'damaged.json').write_text('{')
    return tmp_path


def test_the_page_has_everything_and_needs_no_other_file(workdir, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report', '--workdir', str(workdir)])
    report.command(None)
    assert 'report.html' in capsys.readouterr().out
    text = (workdir / 'report.html').read_text(encoding='utf-8')
    page = Page(text)
    assert page.open == []
    sources = [value for _, key, value in page.attributes if key == 'src']
    assert len(sources) == 3  # curves, samples, attention
    for source in sources:
        kind, data = source.split(',')
        assert kind == 'data:image/png;base64'
        assert base64.b64decode(data).startswith(b'\x89PNG')
    links = [value for _, key, value in page.attributes if key == 'href']
    identifiers = {value for _, key, value in page.attributes if key == 'id'}
    assert links == ['#small', '#samples', '#attention']
    assert {link.removeprefix('#') for link in links} == identifiers
    assert not re.search(r'@import|url\(|https?://|<script|<link', text)
    assert 'prefers-color-scheme: dark' in text


def test_the_table_is_that_of_the_files(workdir):
    page = Page(report.page(workdir))
    assert 'Fixed & <b>' in page.text
    body = ' '.join(page.text)
    assert 'published ours published ours Fixed & <b> 3.325 4.000' in body
    assert 'scale=quick: 1 of 2 rows have a result, from 1 runs.' in body
    assert 'Fixed & <b>, Photos 1 100 614,400 2.3 1.5 100' in body
    assert 'Fixed & <b> Photos 0.5 9 1.0' in body
    assert 'medians of 5 rounds' in body
    assert 'small/cpu/photos/fixed-b/seed0/samples' in body
    assert 'Run on abacus' in body


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['report', '--workdir', str(tmp_path)])
    with pytest.raises(SystemExit):
        report.command(None)
    assert 'has no table and no picture of a run; give the --workdir' in capsys.readouterr().err
