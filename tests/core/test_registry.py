import numpy as np
import pytest

import combiner
from combiner.attention.full import Full
from combiner.core import registry
from combiner.core.mechanism import Mechanism
from combiner.core.module import Attention


def test_names():
    assert combiner.names() == sorted(combiner.names())
    everything, others = (combiner.names(full_support=full_support) for full_support in (True, False))
    assert sorted(everything + others) == combiner.names()
    assert {'full', *(name for name in combiner.names() if name.startswith('combiner_'))} <= set(everything)
    assert {'axial', 'fixed', 'logsparse'} <= set(others)


def test_resolve_a_dotted_path():
    assert registry.resolve('combiner.attention.full:Full') is Full is registry.resolve('full')


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('combiner_fixd', "unknown mechanism 'combiner_fixd'; did you mean 'combiner_fixed'?"),
        ('nothing', f'Known: {", ".join(combiner.names())}; or a path'),
        ('no.such.module:X', "cannot import the mechanism 'no.such.module:X': No module named"),
        ('combiner.attention.full:Nothing', "has no attribute 'Nothing'"),
        (':', "cannot import the mechanism ':'"),
        ('.full:Full', "cannot import the mechanism '.full:Full'"),
        ('combiner.patterns:Pattern', 'is no subclass of combiner.Mechanism'),
        ('combiner:Attention', 'is no subclass of combiner.Mechanism'),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message.replace('?', r'\?')):
        registry.resolve(name)


def test_hyper_parameters():
    assert registry.hyper_parameters('combiner_axial_rowmajor') == {
        'columns': None,
        'key': 'attended',
        'implementation': None,
    }
    assert registry.hyper_parameters('full') == {'implementation': None}
    with pytest.raises(ValueError, match="combiner_fixed has no hyper-parameter 'columns'; it has: pool, block"):
        registry.make_mechanism('combiner_fixed', {'columns': 4})
    with pytest.raises(ValueError, match="full has no hyper-parameter 'heads'; it has: implementation"):
        registry.make_mechanism('full', {'heads': 4})


def test_hyper_parameters_take_numpy_scalars_and_integers_for_floats():
    class Scaled(Full):
        scale: float = 1.0
        spans: tuple[int, ...] = ()

    registry.register('scaled')(Scaled)
    try:
        assert registry.make_mechanism('scaled', {'scale': 2, 'spans': (1, 2)}).scale == 2
        assert registry.make_mechanism('scaled', {'spans': [1, 2]}).spans == (1, 2)
        with pytest.raises(ValueError, match="scale='2' must be of type float, not str"):
            registry.make_mechanism('scaled', {'scale': '2'})
        with pytest.raises(ValueError, match='scale=True must be of type float, not bool'):
            registry.make_mechanism('scaled', {'scale': True})
        with pytest.raises(ValueError, match=r"spans='12' must be of type tuple\[int, \.\.\.\], not str"):
            registry.make_mechanism('scaled', {'spans': '12'})
    finally:
        del registry._REGISTRY['scaled']
    assert registry.make_mechanism('combiner_fixed', {'block': np.int64(4)}).block == 4


POSTPONED = """from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from combiner import Mechanism
from combiner.core.mechanism import Count

if TYPE_CHECKING:
    from combiner.patterns import Pattern


class Ours(Mechanism):
    scale: float = 1.0
    block: int | None = None
    globals: Count = 0
    limit: ClassVar[int] = 3

    def pattern(self, length: int) -> Pattern:
        raise NotImplementedError
"""


def test_postponed_annotations_are_checked_like_others(tmp_path, monkeypatch):
    (tmp_path / 'postponed.py').write_text(POSTPONED, encoding='utf-8')
    unknown = POSTPONED.replace('scale: float', 'scale: Pattern')
    (tmp_path / 'unknown_type.py').write_text(unknown, encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(registry.hyper_parameters('postponed:Ours')) == ['scale', 'block', 'globals']
    assert registry.make_mechanism('postponed:Ours', {'scale': 2, 'globals': 0}).scale == 2
    for hyper, message in (
        ({'scale': '2'}, "scale='2' must be of type float, not str"),
        ({'block': 0}, 'Ours: block must be at least 1, got 0'),
        ({'globals': -1}, 'Ours: globals must be at least 0, got -1'),
    ):
        with pytest.raises(ValueError, match=message):
            registry.make_mechanism('postponed:Ours', hyper)
    with pytest.raises(
        ValueError, match="of Ours has a type that is unknown here: name 'Pattern' is not defined; import"
    ):
        registry.resolve('unknown_type:Ours')


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'full' is registered already, as Full"):
        registry.register('full')(Mechanism)


@pytest.mark.parametrize('method', ['pattern', 'attend', 'decode_step'])
def test_a_mechanism_that_subclasses_the_module_is_told_the_way_out(method):
    with pytest.raises(TypeError, match=r'Ours subclasses Attention, .*: subclass combiner\.Mechanism instead'):
        type('Ours', (Attention,), {method: lambda self: None})


class Shifted(Mechanism):
    """A mechanism whose author forgot that an integer is at least 1."""

    offset: int = 0


def test_an_author_is_told_of_the_type_that_may_be_0_and_a_user_is_not():
    with pytest.raises(ValueError, match=r'offset must be at least 1, got 0; annotate one .* core\.mechanism\.Count'):
        Shifted()
    with pytest.raises(ValueError, match=r'block must be at least 1, got 0$'):
        registry.make_mechanism('combiner_fixed', {'block': 0})
