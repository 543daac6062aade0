import json

import pytest

from experiments.tables import photos

CODECS = {'png': 5.6, 'webp_lossless': 4.5, 'order0_entropy': 7.9}


def evaluation(bits):
    return {'bits_per_dim': bits, 'dataset': 'photos', 'examples': 9, 'step': 3, 'codecs_bits_per_dim': CODECS}


def finish(workdir, bits):
    """What a finished run leaves behind: 100 steps of 8·768 tokens, 60 at 6,144 tokens/s and 40 at half of that."""
    workdir.mkdir()
    (workdir / 'config.json').write_text(json.dumps({'task': 'photos16', 'data': {'batch_size': 8, 'options': {}}}))
    lines = [{'step': 60, 'tokens_per_second': 6144}, {'step': 60, 'validation_bits_per_dim': 5.0}]
    lines.append({'step': 100, 'tokens_per_second': 3072})
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (workdir / 'evaluation_test_latest.json').write_text(json.dumps(evaluation(bits)))


def test_the_table_is_sorted_with_the_codecs_in_their_place():
    rows = [
        {'attention': name, 'train_minutes': 2.0, **evaluation(bits)} for name, bits in (('axial', 5.0), ('full', 4.2))
    ]
    names = [line.split('|')[1].strip() for line in photos.table(rows).splitlines()[2:]]
    assert names == ['`full`', '*WebP, lossless*', '`axial`', '*PNG*', '*order-0 entropy*']


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path, capsys):
    finish(tmp_path / 'axial', 5.0)
    finish(tmp_path / 'full', 4.0)
    arguments = ['photos', '--workdir', str(tmp_path), '--results', str(tmp_path / 'results'), '--names', 'axial,full']
    monkeypatch.setattr('sys.argv', arguments)
    photos.main()
    rows = json.loads((tmp_path / 'results' / 'photos.json').read_text())['rows']
    assert [row['bits_per_dim'] for row in rows] == [5.0, 4.0]
    assert rows[0]['train_minutes'] == pytest.approx((60 + 80) / 60, abs=0.01)
    assert '| `full` | 4.000 | 2.3 |' in (tmp_path / 'results' / 'photos.md').read_text()
    assert '`full`' in capsys.readouterr().out
