import pytest

from experiments.harness import marked

PAGE = 'Before.\n\n<!-- one -->\n\nold\n\n<!-- /one -->\n\n<!-- one more -->\n<!-- /one more -->\n'


@pytest.fixture
def page(tmp_path):
    path = tmp_path / 'page.md'
    path.write_text(PAGE, encoding='utf-8')
    return path


def test_a_part_is_replaced_and_the_rest_stays(page):
    marked.fill(page, {'one': r'new \1', 'one more': 'other'})
    expected = PAGE.replace('old', r'new \1').replace('more -->\n<', 'more -->\n\nother\n\n<')
    assert page.read_text(encoding='utf-8') == expected
    marked.fill(page, {'one': r'new \1', 'one more': 'other'})
    assert page.read_text(encoding='utf-8') == expected


def test_a_part_needs_its_comments_and_nothing_is_written_without(page):
    with pytest.raises(ValueError, match='<!-- two --> and <!-- /two --> once each'):
        marked.fill(page, {'one': 'new', 'two': 'new'})
    assert page.read_text(encoding='utf-8') == PAGE
    with pytest.raises(ValueError, match='<!-- one --> and <!-- /one --> once each'):
        marked.filled(PAGE + PAGE, {'one': 'new'})


def test_a_table_is_markdown():
    assert marked.table(['a', 'b'], [['1', '2']]) == '| a | b |\n| --- | --- |\n| 1 | 2 |'
