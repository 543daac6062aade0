from experiments.harness import timing


def test_needed_arithmetic_is_that_of_the_pattern():
    shape = timing.Shape(length=16, heads=2, head_width=8, causal=True)
    dense, fixed = (timing.mechanism(name, causal=True) for name in ('dense', 'combiner_fixed+block=4'))
    # Products of queries and keys: a triangle; 4 triangles, 4 rows for each of 1 + 2 + 3 spans, 3 spans of 4 members.
    assert timing.needed_flop(dense, 'core', shape) == 4 * 16 * (16 * 17 // 2)
    assert timing.needed_flop(fixed, 'core', shape) == 4 * 16 * (4 * 10 + 4 * 6 + 12)
    assert timing.needed_flop(fixed, 'layer', shape) == 4 * 16 * (4 * 10 + 4 * 6 + 12) + 4 * 2 * 16 * 16 * 16
