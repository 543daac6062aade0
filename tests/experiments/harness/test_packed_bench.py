import json

import numpy as np
import pytest

from experiments.harness import packed_bench


def test_a_row_has_as_many_documents_as_asked_for():
    for count in (1, 2, 8):
        segments = packed_bench.documents(50, count)
        assert segments.shape == (1, 50)
        assert len(np.unique(segments)) == count
        assert (np.diff(segments) >= 0).all()


def test_both_ways_are_timed_and_give_the_same(tmp_path, capsys):
    out = tmp_path / 'packed.json'
    packed_bench.main(
        ['--names', 'full,fixed', '--length', '32', '--documents', '3', '--repeats', '1', '--out', str(out)]
    )
    found = json.loads(out.read_text())
    assert [row['name'] for row in found['rows']] == ['full', 'fixed']
    assert all(row[f'{each}_times'] > 0 for row in found['rows'] for each in ('forward', 'forward_backward'))
    assert capsys.readouterr().out.splitlines()[5:] == list(map(packed_bench.line, found['rows']))

    segments = packed_bench.documents(32, 3)
    inputs = tuple(np.random.default_rng(0).standard_normal((3, 1, 32, 8, 64)).astype(np.float32))
    programs = packed_bench.programs_of('fixed', segments, inputs)
    outputs = [programs['fixed', way, 'forward'].run(*inputs) for way in packed_bench.WAYS]
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize('arguments', [['--names', 'bigbird'], ['--documents', '0'], ['--documents', '4096']])
def test_it_refuses_what_it_cannot_pack(arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        packed_bench.main(arguments)
    assert arguments[1] in capsys.readouterr().err
