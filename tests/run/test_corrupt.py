import errno
import os

import pytest

from combiner.run import corrupt


@pytest.mark.parametrize('number', [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_out_of_reach_is_not_damaged(number):
    error = OSError(number, os.strerror(number))
    assert not corrupt.is_damage(error)
    assert not corrupt.is_damage(RuntimeError(f'open() failed: {os.strerror(number)}'))


@pytest.mark.parametrize('error', [ValueError('no such field'), OSError(errno.EIO, os.strerror(errno.EIO)), KeyError()])
def test_other_errors_may_mean_damage(error):
    assert corrupt.is_damage(error)
