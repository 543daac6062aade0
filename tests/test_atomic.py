import os
import time

import pytest

from combiner import atomic


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / 'file'
    with atomic.replacing(path) as temporary:
        temporary.write_text('first', encoding='utf-8')
        assert not path.exists()

    def fail():
        with atomic.replacing(path) as temporary:
            temporary.write_text('sec', encoding='utf-8')
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text(encoding='utf-8') == 'first'
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_was_abandoned_is_swept(tmp_path):
    with atomic.replacing(tmp_path / 'file') as temporary, atomic.replacing(tmp_path / 'file') as other:
        temporary.touch()
        other.touch()
        os.utime(temporary, (0, time.time() - 2 * 24 * 3600))
        atomic.sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [other]
        temporary.touch()
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_a_folder_is_whole_or_absent(tmp_path):
    path, abandoned = tmp_path / 'deep' / 'folder', tmp_path / 'deep' / 'folder.writing-0'
    abandoned.mkdir(parents=True)
    (abandoned / 'half').touch()
    (tmp_path / 'deep' / 'mine.writing-1').touch()
    for old in (abandoned, tmp_path / 'deep' / 'mine.writing-1'):
        os.utime(old, (0, 0))
    with atomic.new_folder(path) as temporary:
        (temporary / 'file').write_text('all', encoding='utf-8')
        assert not path.exists()
    assert (path / 'file').read_text(encoding='utf-8') == 'all'
    assert sorted(each.name for each in path.parent.iterdir()) == ['folder', 'mine.writing-1']

    def fail(path):
        with atomic.new_folder(path) as temporary:
            (temporary / 'file').touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail(tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
    with pytest.raises(OSError, match='not empty'), atomic.new_folder(path):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ['deep']
