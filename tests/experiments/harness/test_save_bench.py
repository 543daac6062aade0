import pytest

from experiments.harness import save_bench


@pytest.mark.slow
def test_a_save_is_timed_and_its_share_follows_the_schedule(tiny, tmp_path):
    config = tiny.config(**{'run.checkpoint_every': 7})
    row = save_bench.measure('tiny', config, rounds=2, folder=tmp_path)
    assert row['state_mb'] == 0.2
    assert 0 < row['call_seconds'] < 60
    assert row['share'] == row['cost_seconds'] / (7 * row['seconds_per_step'])
    assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} >= {'3', '4'}
    assert '7 steps' in save_bench.line(row)
