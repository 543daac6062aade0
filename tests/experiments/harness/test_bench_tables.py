import pytest

from experiments.harness import bench_tables


def rows(name, milliseconds, what='core', needed=None):
    """One row for each length, with times of the forward pass, the other pass taking three times as long."""
    return [
        {
            'what': what,
            'name': name,
            'length': length,
            'forward_ms': ms,
            'forward_times_faster': None,
            'forward_needed_gflops': needed,
            'forward_backward_ms': 3 * ms,
            'forward_backward_times_faster': 2.0,
            'forward_backward_needed_gflops': needed,
            'forward_backward_temporaries_mb': 1234.5,
            'forward_backward_compile_s': 0.26,
        }
        for length, ms in milliseconds.items()
    ]


LENGTHS = (100, 128, 256, 512)
DENSE = rows('dense', {length: length**2 / 1e4 for length in LENGTHS})
LINEAR = rows('linear', {length: 2e-2 * length for length in (*LENGTHS, 1024)}, needed=25.0)


def summary(measured, fit_from=1):
    return {found['name']: found for found in bench_tables.summarise(measured, fit_from, peak_gflops=100.0)}


def test_growth_crossover_and_share_of_the_peak():
    found = summary(DENSE + LINEAR)
    assert found['dense']['forward_exponent'] == found['dense']['forward_backward_exponent'] == 2
    assert found['linear']['forward_exponent'] == 1
    assert found['linear']['forward_crossover'] == 256  # 200 is where the lines meet
    assert found['linear']['forward_share_of_peak'] == 0.25
    assert found['dense']['forward_share_of_peak'] is None


def test_a_crossover_needs_dense_at_that_length_and_a_power_of_two():
    assert summary(rows('dense', {100: 9.0}) + rows('slow', {100: 1.0, 128: 1.0}))['slow']['forward_crossover'] is None
    assert summary(LINEAR)['linear']['forward_crossover'] is None


def test_what_was_measured_apart_is_kept_apart():
    found = list(bench_tables.summarise(DENSE + rows('dense', {128: 1.0}, what='layer'), 1, 100.0))
    assert [(each['what'], each['forward_exponent']) for each in found] == [('core', 2), ('layer', None)]


def test_the_fit_leaves_out_short_lengths():
    bent = rows('bent', {128: 5.0, 256: 5.0, 512: 10.0, 1024: 20.0})
    assert summary(bent)['bent']['forward_exponent'] == pytest.approx(0.7, abs=0.01)
    found = summary(bent, fit_from=256)['bent']
    assert (found['forward_exponent'], found['fitted_lengths']) == (1, [256, 512, 1024])


def test_tables():
    measured = DENSE + LINEAR + rows('linear', {512: 1.0}, what='layer')
    lines = bench_tables.table(measured, 'core', 512).splitlines()
    assert lines[2:] == [
        '| `dense` | 512 | 26 ms | 79 ms (2.0×) | 1,234 MB | 0.3 s |',
        '| `linear` | 512 | 10 ms | 31 ms (2.0×) | 1,234 MB | 0.3 s |',
    ]
    lines = bench_tables.summary_table(list(summary(DENSE + LINEAR).values()), 'core').splitlines()
    assert lines[2:] == [
        '| `dense` | l^2.00 | 128 | – | l^2.00 | 128 | – |',
        '| `linear` | l^1.00 | 256 | 25.0% | l^1.00 | 256 | 25.0% |',
    ]
