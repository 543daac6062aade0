"""Parts of a table, joined, are the table of all runs; what contradicts itself is refused with both values."""

import copy
import json
import math
from pathlib import Path

import finished
import pytest

from experiments.harness import claim_table, declarations, merging, table_files
from experiments.harness import run as runs

RESULTS = Path(__file__).parents[3] / 'results'
COMMITTED = sorted(RESULTS.glob('*.md'))
ROWS = (
    finished.row('Full', published=4.25),
    finished.row('Full', 'Larger', 'attention=full,size=32'),
    finished.row('Axial', argument='attention=axial'),
)
EVERY = {(row, seed) for row in range(len(ROWS)) for seed in range(3)}


@pytest.fixture(autouse=True)
def _declared(monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
    monkeypatch.setattr(declarations, 'table_rows', lambda: {'small': ROWS})


def table_of(folder, done):
    """The document of the table after some (row, seed) have been run."""
    planned = [finished.run(row, folder, seed) for row in ROWS for seed in range(3)]
    for index, run in enumerate(planned):
        if (index // 3, run.seed) in done:
            assert runs.complete(run, finished.Fake()) is None
            values = [{'step': step, 'validation_bits_per_dim': 9 - step / 64 - index} for step in (60, 100)]
            (run.workdir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, values)))
    table_files.write_table('small', 'quick', planned, folder)
    return json.loads((folder / 'small.json').read_text())


@pytest.mark.parametrize(
    'parts',
    [
        [{each for each in EVERY if each[0] == row} for row in (2, 0, 1)],
        [{each for each in EVERY if each[1] == seed} for seed in (1, 2, 0)],
        [EVERY - {(0, 0), (1, 1)}, EVERY - {(2, 2)}],
        [EVERY, set()],
        [set(), EVERY],
    ],
    ids=['by row', 'by seed', 'overlapping', 'nothing second', 'nothing first'],
)
def test_parts_joined_are_the_table_of_all_runs(parts, tmp_path):
    sources = {f'{index}.json': table_of(tmp_path / str(index), part) for index, part in enumerate(parts)}
    joined = merging.join(sources)
    assert joined == table_of(tmp_path / 'all', EVERY)
    assert merging.join({'joined.json': joined, **sources}) == joined


def halves(document):
    """Every other row of a document, and the rest, of all its parts but the costs, which both have."""
    keys = [merging.key_of(row) for row in document['rows']]
    for chosen in (set(keys[1::2]), set(keys[::2])):
        half = copy.deepcopy(document)
        for part in {'rows', 'curves', 'sweep'} & half.keys():
            half[part] = [entry for entry in half[part] if merging.key_of(entry) in chosen]
        yield half


@pytest.mark.parametrize('path', COMMITTED, ids=lambda path: path.stem)
def test_halves_of_the_results_of_earlier_versions_are_joined(path, monkeypatch):
    monkeypatch.undo()  # declared are the real tables
    document = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
    joined = merging.join(dict(zip('ab', halves(document), strict=True)))
    assert table_files.markdown(joined) == path.read_text(encoding='utf-8')


def row(*values, model='Full', **more):
    of_run = {'evaluated_on': 'a', 'steps': 100, 'commit': 'abc'}
    found = [{'seed': seed, 'value': value, **of_run} for seed, value in enumerate(values)]
    of_row = {'model': model, 'column': 'Photos', 'config': 'photos.py', 'argument': 'x', 'metric': 'bits_per_dim'}
    return {**of_row, 'published': None, 'settings': [], **more, 'ours': {}, 'runs': found}


def document(rows, **more):
    return {'name': 'small', 'scale': 'quick', 'rows': rows, **more}


def curve(*values, seeds=((0,),)):
    of_row = {'column': 'Photos', 'model': 'Full', 'steps': [100], 'validation': [list(values)]}
    return {**of_row, 'seeds': list(map(list, seeds))}


def sweep(rate, **validation):
    values = {name.replace('_', '.'): value for name, value in validation.items()}
    return {'column': 'Photos', 'model': 'Full', 'validation': values, 'rate': rate}


WHOLE = document([row(4.0, 5.0)], curves=[curve(3.0)], sweep=[sweep(0.5, r0_5=3.0, r1_0=4.0)])


@pytest.mark.parametrize(
    ('other', 'said'),
    [
        (document([row(4.0, 5.5)]), 'value of Photos, Full, seed 1 is 5.0 in a.json, and 5.5 in b.json; leave out one'),
        (document([row(argument='y')], curves=[curve(3.0)]), "argument of Photos, Full is 'x' in a.json, and 'y' in b"),
        (document([row(9.0, settings=['rate=1'])]), r"settings of Photos, Full is \[\] in a.json, and \['rate=1'\]"),
        (document([row(9.0, pretrain='mlm')]), "pretrain of Photos, Full is '' in a.json, and 'mlm' in b.json"),
        (
            document([{**row(), 'runs': [{'seed': 7, 'value': 4.0, 'steps': 50}]}]),
            'steps of Photos, Full is 100 in a.json, and 50 in b.json',
        ),
        (
            document([{**row(), 'runs': [{'seed': 7, 'value': 4.0, 'evaluated_on': 'b'}]}]),
            "evaluated_on of Photos, Full is 'a' in a.json, and 'b' in b.json",
        ),
        (
            document([row()], curves=[curve(3.0, 2.0, seeds=[(1, 0)])]),
            'validation of Photos, Full, seed 0, at step 100 is 3.0 in a.json, and 2.0 in b.json',
        ),
        (
            document([], sweep=[sweep(1.0, r0_5=3.0)]),
            'the chosen learning rate of Photos, Full is 0.5 in a.json, and 1',
        ),
        (document([], sweep=[sweep(0.5, r1_0=7.0)]), 'validation of Photos, Full at learning rate r1.0 is 4.0 in a.js'),
        (document([]) | {'name': 'big'}, 'a.json is small at scale=quick; b.json is big at scale=quick'),
        (document([]) | {'scale': 'cpu'}, 'a.json is small at scale=quick; b.json is small at scale=cpu'),
        (document([], claims=[]), 'small has claims, which are not declared here'),
    ],
)
def test_contradictions_are_refused_with_both_values(other, said):
    with pytest.raises(ValueError, match=said):
        merging.join({'a.json': WHOLE, 'b.json': other})


@pytest.mark.parametrize(
    'other',
    [
        document([row(settings=['rate=1'], argument='old')]),  # nothing was trained with these
        document([row()], sweep=[sweep(None, r0_5=3.5, r1_0=None)]),  # while it was training
    ],
)
@pytest.mark.parametrize('first', [True, False])
def test_what_may_still_change_contradicts_nothing(other, first):
    found = {'whole.json': WHOLE, 'other.json': other}
    joined = merging.join(found if first else dict(reversed(found.items())))
    assert (joined['sweep'], joined['curves']) == (WHOLE['sweep'], WHOLE['curves'])
    assert [(each['settings'], each['argument'], each['ours']['mean']) for each in joined['rows']] == [([], 'x', 4.5)]


def test_the_same_result_on_two_machines_is_that_of_the_first_file():
    again = copy.deepcopy(WHOLE)
    again['rows'][0]['runs'][1]['commit'] = 'def'
    for sources, commit in (({'a': WHOLE, 'b': again}, 'abc'), ({'b': again, 'a': WHOLE}, 'def')):
        assert merging.join(sources)['rows'][0]['runs'][1]['commit'] == commit


def test_only_files_contradict_each_other():
    """The table's command accepted that the seeds of one file differ."""
    own = row(4.0, 5.0)
    own['runs'][1]['steps'] = 50
    assert merging.join({'a.json': document([own])})['rows'][0]['ours']['steps'] == 100


def test_a_seed_that_diverged_on_one_machine_only_is_not_lost():
    parts = {'a.json': document([row(4.0, diverged=[1, 2])]), 'b.json': document([row(4.0, 5.0)])}
    (joined,) = merging.join(parts)['rows']
    assert (joined['ours']['seeds'], joined['diverged']) == (2, [2])


def test_the_steps_of_a_joined_curve_ascend():
    later, earlier = curve(3.0), {**curve(4.0, seeds=[(1,)]), 'steps': [50]}
    (joined,) = merging.join({'a': document([row()], curves=[later]), 'b': document([row()], curves=[earlier])})[
        'curves'
    ]
    assert (joined['steps'], joined['validation'], joined['seeds']) == ([50, 100], [[4.0], [3.0]], [[1], [0]])


def test_two_unfinished_sweeps_are_shown_together():
    parts = [sweep(None, r0_5=None, r1_0=2.0), sweep(None, r0_5=1.0, r1_0=9.0)]
    joined = merging.join({name: document([], sweep=[part]) for name, part in zip('ab', parts, strict=True)})
    assert joined['sweep'] == [sweep(None, r0_5=1.0, r1_0=2.0)]


def test_values_that_are_no_numbers_agree():
    same = document([row(4.0)], curves=[curve(math.nan)])
    joined = merging.join({'a.json': same, 'b.json': copy.deepcopy(same)})
    assert math.isnan(joined['curves'][0]['validation'][0][0])


def session(device, *models, failed=()):
    rows = [{'column': 'Photos', 'model': model, 'seconds_per_step': len(device)} for model in models]
    untimed = [{'column': 'Photos', 'model': model, 'wrong': f'too large for {device}'} for model in failed]
    return {'device': device, 'rounds': 5, 'rows': rows, 'not_measured': untimed}


def test_a_row_keeps_the_time_of_the_session_with_most_rows():
    small, large = (
        session('small', 'Full', 'Fixed', failed=['Tree', 'Axial']),
        session('large', 'Full', 'Axial', 'Local'),
    )
    parts = {
        'a.json': document([], costs=[small]),
        'b.json': document([], costs=[large, session('tiny', failed=['Tree', 'Local'])]),
    }
    joined = merging.join(parts)
    assert joined['costs'] == [large, session('small', 'Fixed', failed=['Tree'])]
    assert merging.join({'joined.json': joined, **parts})['costs'] == joined['costs']


def declare(monkeypatch, *claims):
    table = claim_table.ClaimTable('small', ROWS, claims=claims)
    monkeypatch.setattr(declarations, 'claim_tables', lambda: {'small': table})


def test_a_claim_about_rows_of_two_files_is_judged(monkeypatch):
    declare(monkeypatch, claim_table.Claim('Photos', 'Full', 'Axial'))
    parts = {'a.json': document([row(4.0)], claims=[]), 'b.json': document([row(5.0, model='Axial')], claims=[])}
    (judged,) = merging.join(parts)['claims']
    assert (judged['better']['mean'], judged['worse']['mean'], judged['shown']) == (4.0, 5.0, True)


def test_rows_are_compared_with_the_chance_that_all_files_have(monkeypatch):
    declare(monkeypatch)
    parts = {}
    for name, model, chance in (('a.json', 'Full', 0.25), ('b.json', 'Axial', 0.25), ('c.json', 'Local', 0.5)):
        of_row = row(0.75, model=model, metric='accuracy')
        of_row['runs'][0]['examples'] = 9
        parts[name] = document([of_row], claims=[{'worse': {'mean': chance}}])
    with pytest.raises(ValueError, match=r'most frequent class is 0.25 in a.json, and 0.5 in c.json'):
        merging.join(parts)
    del parts['c.json']
    judged = merging.join(parts)['claims']
    assert [(each['better']['model'], each['worse']['mean']) for each in judged] == [('Full', 0.25), ('Axial', 0.25)]


def call(folder, *arguments):
    """The exit status of the command."""
    try:
        merging.command('', [*map(str, arguments), '--out', str(folder / 'out' / 'small.json')])
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_command_writes_all_three_files(tmp_path, capsys):
    table_of(tmp_path / 'a', {(0, 0)})
    table_of(tmp_path / 'b', {(2, 1)})
    files = [tmp_path / part / 'small.json' for part in 'ab']
    assert call(tmp_path, *files) == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'small.json', 'small.md', 'small.png'}
    shown = capsys.readouterr().out
    assert '2 of 3 rows have a result, from 2 runs; the table: ' in shown
    assert 'earlier version' not in shown
    assert call(tmp_path, tmp_path / 'out' / 'small.json', files[0]) == 0  # the result may be one of the files


@pytest.mark.parametrize(
    ('content', 'said'),
    [
        ('{"name": ', 'b.json is no JSON file (Expecting value'),
        ('{"config": "configs/photos.py", "rows": []}', 'b.json is not the document of a table'),
        (json.dumps(document([{'model': 'Full'}])), 'b.json is not the document of a table'),
        (json.dumps(document([], more=1)), 'b.json has more, which cannot be joined; known: claims, costs'),
        (
            json.dumps(document([], curves=[{'model': 'Full'}])),
            "a part of a file has no 'column'; write the files again",
        ),
        (json.dumps(document([row(9.0)])), 'value of Photos, Full, seed 0 is 4.0 in'),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(content, said, tmp_path, capsys):
    (tmp_path / 'a.json').write_text(json.dumps(WHOLE))
    (tmp_path / 'b.json').write_text(content)
    assert call(tmp_path, tmp_path / 'a.json', tmp_path / 'b.json') == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert call(tmp_path, tmp_path / 'absent.json') == 2
    assert 'absent.json' in capsys.readouterr().err
