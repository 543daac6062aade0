import json

from experiments import photos

CODECS = {'png': 5.6, 'webp_lossless': 4.5, 'order0_entropy': 7.9}


def result(name, bits):
    return {
        'attention': name,
        'bits_per_dim': bits,
        'train_minutes': 2.0,
        'dataset': 'photos',
        'examples': 9,
        'step': 3,
        'codecs_bits_per_dim': CODECS,
    }


def test_the_table_is_sorted_with_the_codecs_in_their_place():
    lines = photos.table([result('axial', 5.0), result('combiner_fixed', 4.2)]).splitlines()
    assert [line.split('|')[1].strip() for line in lines[2:]] == [
        '`combiner_fixed`',
        '*WebP, lossless*',
        '`axial`',
        '*PNG*',
        '*order-0 entropy*',
    ]


def test_what_is_done_is_not_done_again(monkeypatch, tmp_path, capsys):
    for name, bits in (('axial', 5.0), ('full', 4.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'result.json').write_text(json.dumps(result(name, bits)))
    arguments = ['photos', '--workdir', str(tmp_path), '--results', str(tmp_path / 'results'), '--names', 'axial,full']
    monkeypatch.setattr('sys.argv', arguments)
    photos.main()
    document = json.loads((tmp_path / 'results' / 'photos.json').read_text())
    assert [row['bits_per_dim'] for row in document['rows']] == [5.0, 4.0]
    assert '| `full` | 4.000 | 2.0 |' in (tmp_path / 'results' / 'photos.md').read_text()
    assert '`full`' in capsys.readouterr().out
