"""A folder of tables and runs as commands leave it, for the tests of the report, and the elements of its page."""

import json
from html.parser import HTMLParser

import finished
from PIL import Image

from experiments.harness import run as runs
from experiments.harness import table_files

ODD = '<b>&"\'</script>'
MODELS = {
    'Fixed': ('fixed', 3.408),
    ODD: ('combiner_fixed', 3.325),
    'Axial': ('axial', 3.666),
    'Own': ('lab.own:Own', None),
}
VOID = {'meta', 'img', 'input'}


class Page(HTMLParser):
    """Elements that are open and never closed, all attributes, and the text within each kind of element.

    Attributes:
        open: elements that are not closed.
        elements: (name, attributes) of all.
        rows: of all tables, each a list of (text, data-value).
        text: all text but of scripts and styles.
        scripts: text of scripts and styles.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.text, self.scripts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append(['', dict(attrs).get('data-value')])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] in (['script'], ['style']) else self.text).append(data)
        if 'td' in self.open or 'th' in self.open:
            self.rows[-1][-1][0] += data

    def with_class(self, name):
        return [attributes for _, attributes in self.elements if name in (attributes.get('class') or '').split()]


def picture(path, color='red'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), color).save(path)


def table_of(folder, name='small'):
    """A table of two columns; the second has no result. Returns its runs and its JSON."""
    rows = [finished.row(model, argument=f'attention={key}', published=value) for model, (key, value) in MODELS.items()]
    rows = [row for row in rows if ':' not in row.argument] + [finished.row('Fixed', 'Larger', 'attention=fixed')]
    planned = [finished.run(row, folder / name, seed) for row in rows for seed in range(2)]
    for index, run in enumerate(planned[:6]):
        assert runs.complete(run, finished.Fake()) is None
        with (run.workdir / 'metrics.jsonl').open('a', encoding='utf-8') as file:
            file.write(f'\n{{"step": 100, "validation_bits_per_dim": {2.25 - index / 8}}}\n')
    costs = {'model': 'Fixed', 'column': 'Photos', 'seconds_per_step': 0.5, 'memory_mb': 9.25, 'compile_seconds': 1}
    timed = {**finished.ENVIRONMENT, 'scale': 'quick', 'rounds': 5, 'rows': [costs]}
    (folder / f'{name}_costs.json').write_text(json.dumps([timed]))
    table_files.write_table(name, 'quick', planned, folder)
    return planned, json.loads((folder / f'{name}.json').read_text())


def attention_of(workdir, layers=2, heads=3):
    """Files of `experiments.figures.attention_map --layer all`."""
    for layer in range(layers):
        found = {'layer': layer, 'image': 0, 'step': 100, 'attention': {'name': 'fixed'}, 'length': 8}
        found |= {'tokens_per_pixel': 2, 'pattern_picture': f'attention_map_{layer}_0_pattern.png', 'heads': []}
        for head in range(heads):
            name = f'attention_map_{layer}_0_head{head}.png'
            picture(workdir / name, (40 * layer, 0, 40 * head))
            found['heads'].append({'rank': 10 * layer + head, 'direct_weight': 0.25, 'picture': name})
        picture(workdir / found['pattern_picture'], 'blue')
        (workdir / f'attention_map_{layer}_0.json').write_text(json.dumps(found))


def folder_of(folder):
    """A table, samples of images and of text, attention maps, and files that are of no table. Returns as `table_of`."""
    planned, content = table_of(folder)
    first = planned[0].workdir
    picture(first / 'samples.png')
    picture(first / 'checkpoints' / 'samples.png')  # not to be shown
    (first / 'samples.txt').write_text('<given> & sampled ' * 1000, encoding='utf-8')
    attention_of(first)
    (folder / 'other.json').write_text('{"rows": []}')
    return planned, content
