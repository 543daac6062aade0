import sys

from combiner.monitoring.progress import Progress


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    progress = Progress(0, 20, tokens_per_step=100)
    with progress.pause():
        pass
    steps, rate = progress.measure(10)
    progress.report('8.000 bits/dim', 0.0)
    assert capsys.readouterr().out == 'step 10/20: 8.000 bits/dim\n'
    progress.report('4.500 bits/dim', rate, ', 41.0% MFU')
    out = capsys.readouterr().out
    assert (steps, rate > 0) == (10, True)
    assert out.startswith('step 10/20: 4.500 bits/dim, ')
    assert ' tokens/s, 41.0% MFU, ' in out
    assert out.endswith('left\n')


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    progress = Progress(5, 20, tokens_per_step=100)
    for _ in range(5):
        progress.advance()
    progress.report('4.500 bits/dim', progress.measure(10)[1])
    progress.close()
    err = capsys.readouterr().err
    assert '10/20' in err
    assert '4.500 bits/dim' in err
