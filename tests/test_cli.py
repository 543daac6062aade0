import logging

import pytest

from combiner import cli


@pytest.mark.parametrize(
    ('path', 'level', 'shown'),
    [
        (cli.__file__, logging.INFO, True),
        ('/site-packages/jax/_src/xla_bridge.py', logging.INFO, False),
        ('/site-packages/jax/_src/xla_bridge.py', logging.WARNING, True),
        ('/site-packages/orbax/checkpoint/checkpoint_manager.py', logging.WARNING, False),
        ('/site-packages/orbax/checkpoint/checkpoint_manager.py', logging.ERROR, True),
        ('/site-packages/tensorflow_datasets/core/features/image_feature.py', logging.WARNING, False),
    ],
)
def test_what_other_libraries_say_is_shown_when_it_helps(path, level, shown):
    record = logging.LogRecord('absl', level, path, 1, 'said', None, None)
    assert cli._worth_showing(record) == shown
