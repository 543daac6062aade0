import itertools
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from combiner.data.lra import listops

FUNCTIONS = {
    'MIN': min,
    'MAX': max,
    'MED': lambda values: int(statistics.median(map(Fraction, values))),
    'SM': lambda values: sum(values) % 10,
}


def value_by_rewriting(source: str) -> int:
    """Independent of the generator: innermost lists are replaced by their value until a digit is left."""
    text = re.sub(r'[() ]+', ' ', source).strip()
    innermost = re.compile(r'\[(MIN|MAX|MED|SM)((?: \d)+) \]')
    while '[' in text:
        text, replaced = innermost.subn(lambda m: str(FUNCTIONS[m[1]](list(map(int, m[2].split())))), text)
        assert replaced, text[:100]
    return int(text)


def uniform(seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    return itertools.chain.from_iterable(iter(lambda: rng.integers(720, size=4096).tolist(), None))


def depth(tokens: list[int]) -> int:
    opens = np.array([1 if 11 <= token <= 14 else -1 if token == 15 else 0 for token in tokens])
    return 1 + max(itertools.accumulate(opens.tolist()))


def pairs(text: str) -> list[str]:
    """Splits '( LEFT RIGHT )' into its two parts."""
    level, parts, part = 0, [], []
    for word in text.split()[1:-1]:
        level += {'(': 1, ')': -1}.get(word, 0)
        part.append(word)
        if not level:
            parts.append(' '.join(part))
            part = []
    return parts


def test_vocabulary_has_a_fixed_order():
    assert ' '.join(listops.VOCABULARY) == '<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]'


@pytest.mark.parametrize(
    ('source', 'value'),
    [
        ('( ( ( [MED 0 ) 5 ) ] )', 2),
        ('( ( ( [MED 9 ) 6 ) ] )', 7),
        ('( ( ( ( [MED 9 ) 1 ) 4 ) ] )', 4),
        ('( ( ( ( [SM 9 ) 8 ) 5 ) ] )', 2),
        ('( ( ( [MIN ( ( ( [MAX 2 ) 7 ) ] ) ) 8 ) ] )', 7),
    ],
)
def test_a_known_tree_is_read_written_and_evaluated(source, value):
    tokens = listops.tokenize(source, 'known').tolist()
    assert listops.evaluate(tokens) == value == value_by_rewriting(source)
    assert listops.write_source(tokens) == source


def test_every_label_agrees_with_another_evaluator():
    for index in range(200):
        tokens = listops.generate(0, index)
        source = listops.write_source(tokens)
        assert listops.evaluate(tokens) == value_by_rewriting(source)
        np.testing.assert_array_equal(listops.tokenize(source, 'own'), tokens)
        assert 500 < len(tokens) < 2000
        assert depth(tokens) <= 10


def test_sources_are_nested_pairs():
    def check(text):
        if text.startswith('('):
            left, right = pairs(text)
            check(left)
            check(right)
        else:
            assert text in listops.VOCABULARY[1:]

    check(listops.write_source(listops.generate(0, 5)))


def test_a_tree_depends_on_seed_and_index_alone():
    assert listops.generate(3, 7) == listops.generate(3, 7)
    assert len({tuple(listops.generate(seed, index)) for seed in (0, 1) for index in range(5)}) == 10


def test_nodes_have_the_described_frequencies():
    stream = uniform(0)
    roots = [listops.random_tree(stream) for _ in range(20_000)]
    operators = np.bincount([tree[0] for tree in roots if tree and tree[0] > 10], minlength=15)[11:]
    digits = np.bincount([tree[0] for tree in roots if tree and tree[0] <= 10], minlength=11)[1:]
    assert digits.sum() == pytest.approx(15_000, abs=250)
    assert digits == pytest.approx(1500, abs=180)
    assert operators == pytest.approx(operators.mean(), rel=0.12)


def test_what_is_too_long_is_given_up():
    assert listops.random_tree(itertools.repeat(179)) is None  # operators only, down to the greatest depth
    assert listops.random_tree(iter([0, 180, 185])) == [11, 1, 6, 15]  # [MIN 0 5 ]


def test_splits_are_a_shuffle_of_distinct_trees():
    splits = listops.arrange(5, {'train': 600, 'validation': 10, 'test': 20}, map)
    together = np.concatenate(list(splits.values()))
    assert [len(numbers) for numbers in splits.values()] == [600, 10, 20]
    assert sorted(together) == list(range(630))
    assert np.corrcoef(together, np.arange(630))[0, 1] == pytest.approx(0, abs=0.15)


def test_a_tree_that_came_before_is_left_out_for_the_next_index(monkeypatch):
    def repeating(seed, index, lengths):
        return [0, 1, 1, 0, 2, 3, 1, 4][index : index + 1]

    monkeypatch.setattr(listops, 'generate', repeating)
    splits = listops.arrange(0, {'train': 2, 'test': 3}, map)
    assert sorted(np.concatenate(list(splits.values()))) == [0, 1, 4, 5, 7]


@pytest.mark.parametrize('word', ['[FIRST', '10', '<pad>', 'X'])
def test_unknown_tokens_are_named(word):
    with pytest.raises(ValueError, match=r'record train/3: .*(is not a token|padded)'):
        listops.tokenize(f'( ( ( [MAX 1 ) {word} ) ] )', 'train/3')


def test_a_file_of_the_benchmark_is_written(tmp_path):
    listops.write_tsv(tmp_path / 'basic_test.tsv', [{'source': '( ( ( [SM 1 ) 2 ) ] )', 'label': 3}])
    assert (tmp_path / 'basic_test.tsv').read_text() == 'Source\tTarget\n( ( ( [SM 1 ) 2 ) ] )\t3\n'
    assert [path.name for path in tmp_path.iterdir()] == ['basic_test.tsv']


@pytest.mark.parametrize('line', ['( ( ( [SM 1 ) 2 ) ] )', '( 1 )\t10', '( 1 )\t', ''])
def test_a_line_that_is_no_record(line):
    with pytest.raises(ValueError, match='record val/0: expected a source, a tab and a digit'):
        listops.read_line(line, 'val/0')


@pytest.mark.slow
def test_statistics_and_labels_of_many_trees():
    stream = uniform(1)
    drawn = [listops.random_tree(stream) for _ in range(40_000)]
    kept = sum(tree is not None and len(tree) > 500 for tree in drawn)
    assert kept / len(drawn) == pytest.approx(0.0835, abs=0.005)
    lengths = []
    for index in range(20_000):
        tokens = listops.generate(1, index)
        lengths.append(len(tokens))
        assert listops.evaluate(tokens) == value_by_rewriting(listops.write_source(tokens))
    assert min(lengths) > 500
    assert max(lengths) < 2000
    assert np.mean(lengths) == pytest.approx(1040, abs=15)
    assert np.median(lengths) == pytest.approx(958, abs=15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('lengths', 'nothing', 'by_operator', 'by_digits'),
    [(listops.LENGTHS, 0.166, 0.36, 0.48), (listops.SHORT_LENGTHS, 0.159, 0.33, 0.556)],
    ids=['benchmark', 'short'],
)
def test_what_the_outer_list_tells_without_the_inner_ones(lengths, nothing, by_operator, by_digits):
    """As docs/results.md says: the share of labels that a table of the best values finds, on other trees."""
    trees = [listops.generate(seed=7, index=index, lengths=lengths) for index in range(8_000)]
    assert told_by(lambda tree: None, trees) == pytest.approx(nothing, abs=0.015)
    assert told_by(lambda tree: tree[0], trees) == pytest.approx(by_operator, abs=0.015)
    assert told_by(lambda tree: (tree[0], listops.evaluate(without_lists(tree))), trees) == pytest.approx(
        by_digits, abs=0.015
    )


def told_by(view, trees):
    """The share of the second half's values that are the most frequent one of the first half with the same view."""
    half = len(trees) // 2
    values = defaultdict(Counter)
    for tree in trees[:half]:
        values[view(tree)][listops.evaluate(tree)] += 1
    best = {seen: counter.most_common(1)[0][0] for seen, counter in values.items()}
    return statistics.fmean(best.get(view(tree)) == listops.evaluate(tree) for tree in trees[half:])


def without_lists(tree):
    """The outer list with its direct digits alone; with a 0 if it has none."""
    level, digits = 0, []
    for token in tree:
        name = listops.VOCABULARY[token]
        if level == 1 and name.isdigit():
            digits.append(token)
        level += (name in listops.OPERATORS) - (name == ']')
    return [tree[0], *(digits or [listops.VOCABULARY.index('0')]), tree[-1]]
