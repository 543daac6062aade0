"""A data directory with a small version of every set that tasks read, made once for all tests of data."""

import pytest
import small_data

from combiner.data.text import corpora


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """Every data set, small: TFDS's, generated ones, and the files of the Long Range Arena's release."""
    path = tmp_path_factory.mktemp('data')
    small_data.write(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, 'TRAINING_TEXT_BYTES', 200_000)  # of prose, a tokenizer takes ten seconds for all
        yield str(path)
