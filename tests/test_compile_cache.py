from pathlib import Path

import jax
import pytest

from combiner import compile_cache


@pytest.fixture
def unset():
    """JAX without a folder for compiled programs."""
    names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs', 'enable_compilation_cache')
    names = [f'jax_{name}' for name in names]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update('jax_compilation_cache_dir', None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_folder_of_the_user(unset, monkeypatch, tmp_path):
    monkeypatch.delenv('COMBINER_CACHE', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    compile_cache.enable()
    chosen = Path(jax.config.jax_compilation_cache_dir)
    assert chosen.parent == tmp_path / 'combiner' / 'compiled'
    assert chosen.is_dir()
    monkeypatch.setenv('COMBINER_CACHE', str(tmp_path / 'mine'))
    assert compile_cache.folder() == tmp_path / 'mine' / 'compiled' / chosen.name


def test_another_processor_has_another_folder(monkeypatch):
    here = compile_cache.folder()
    monkeypatch.setattr(Path, 'read_text', lambda *_, **__: 'flags\t: fpu avx512_of_another\n')
    assert compile_cache.folder() != here
    assert compile_cache.folder().parent == here.parent


@pytest.mark.parametrize('unusable', ['file', 'gs://bucket/cache'])
def test_a_folder_that_cannot_be_written_is_said_and_nothing_else(unusable, unset, monkeypatch, tmp_path, absl_log):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    monkeypatch.setenv('COMBINER_CACHE', unusable)
    compile_cache.enable()
    assert [path.name for path in tmp_path.iterdir()] == ['file']
    assert jax.config.jax_compilation_cache_dir is None
    assert 'compiled programs are not kept' in absl_log.text
    assert 'COMBINER_CACHE' in absl_log.text


def test_what_the_user_configured_is_left_alone(monkeypatch, tmp_path):
    own = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv('COMBINER_CACHE', str(tmp_path))
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir == own


def test_jax_can_turn_it_off(unset, monkeypatch, tmp_path):
    monkeypatch.setenv('COMBINER_CACHE', str(tmp_path))
    jax.config.update('jax_enable_compilation_cache', False)
    compile_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
