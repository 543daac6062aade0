"""Mistakes in a config file are one line, which names the place of a bug."""

import pytest
from absl import flags
from ml_collections import config_flags

from combiner import config_flag

HEAD = """from combiner import config as common


def get_config(argument=''):
    config = common.base()
"""


@pytest.mark.parametrize(
    ('statement', 'expected'),
    [
        ("config.steps = 'x' + 1", 'TypeError: can only concatenate str (not "int") to str ({file}, line 6)'),
        ("config.steps = int('many')", "invalid literal for int() with base 10: 'many' ({file}, line 6)"),
        ("config.model.layers = 'two'", '({file}, line 6)'),  # raised by ml_collections
        ('common.at(1, 2)', '({file}, line 6)'),  # raised by calling this package
        ('common.parse(argument, layers=2)', "unknown config argument 'size'; known: layers"),
        ("raise ValueError('size=3: choose 1 or 2')", 'size=3: choose 1 or 2'),
    ],
)
def test_a_bug_in_a_config_file_has_its_place_and_a_refusal_has_none(statement, expected, tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(f'{HEAD}    {statement}\n    return config\n', encoding='utf-8')
    values, line = flags.FlagValues(), ['', f'--config={file}:size=3']
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=line)
    with pytest.raises(flags.Error) as error:
        values(line)
    found = config_flag.mistake(error.value)
    expected = expected.format(file=file)
    assert found.endswith(expected)
    assert '\n' not in found
    assert (str(file) in found) == (str(file) in expected)


def test_a_mistake_outside_of_the_file_is_its_last_line():
    assert config_flag.mistake(OSError('Failed loading\nno such file')) == 'no such file'
