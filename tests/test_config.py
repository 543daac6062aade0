import pytest

import combiner
from combiner import config as common
from combiner.core import registry


def test_parse_types_and_defaults():
    args = common.parse('layers=6,tied=true,rate=1e-3', layers=2, tied=False, rate=1.0, attention='full')
    assert vars(args) == {'layers': 6, 'tied': True, 'rate': 1e-3, 'attention': 'full'}
    assert vars(common.parse('', layers=2)) == {'layers': 2}
    assert common.parse('attention=mylab.strided:Strided', attention='full').attention == 'mylab.strided:Strided'


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('layer=6', "unknown config argument 'layer'; did you mean 'layers'\\? known: layers, tied"),
        ('zzz', "unknown config argument 'zzz'; known: layers, tied"),
        ('layers', 'layers=VALUE'),
        ('layers=1,layers=2', 'give each argument once'),
        ('layers=two', 'expected layers=int'),
        ('tied=perhaps', 'expected tied=bool'),
    ],
)
def test_parse_refuses(argument, message):
    with pytest.raises(ValueError, match=message):
        common.parse(argument, layers=2, tied=False)


def test_attention_takes_only_its_own_hyper_parameters():
    assert common.attention('axial', 48).to_dict() == {'name': 'axial', 'columns': 48}
    assert common.attention('combiner_fixed', 48).to_dict() == {'name': 'combiner_fixed', 'block': 48}
    assert common.attention('strided', 48).to_dict() == {'name': 'strided', 'stride': 48}
    assert common.attention('mylab.strided:Strided').to_dict() == {'name': 'mylab.strided:Strided'}  # without rows
    with pytest.raises(ValueError, match='cannot import the mechanism'):
        common.attention('mylab.strided:Strided', 48)


class Ours(combiner.Mechanism):
    block: int = 7
    window: int = 3


@pytest.mark.parametrize('name', [*combiner.names(), f'{__name__}:Ours'])
def test_rows_of_the_data_are_the_rows_blocks_and_strides_of_every_mechanism(name):
    config = common.attention(name, 48).to_dict()
    sizes = {size for size in ('columns', 'block', 'stride') if size in registry.hyper_parameters(name)}
    assert config == {'name': name} | dict.fromkeys(sizes, 48)
    assert sizes or name not in ('axial', 'fixed', 'strided', f'{__name__}:Ours')


def test_a_mechanism_with_hyper_parameters():
    assert common.mechanism('axial') == ('axial', {})
    text = 'mylab.strided:Strided+stride=8+key=token+joint=True+shift=-1+near=false'
    hyper = {'stride': 8, 'key': 'token', 'joint': True, 'shift': -1, 'near': False}
    assert common.mechanism(text) == ('mylab.strided:Strided', hyper)
    assert common.attention('axial+columns=6', 48).to_dict() == {'name': 'axial', 'columns': 6}


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('7', 7),
        ('-0', 0),
        ('0.9', 0.9),
        ('-.5', -0.5),
        ('2.', 2.0),
        ('1e-3', 0.001),
        ('1E3', 1000.0),
        ('none', None),
        ('None', None),
        ('TRUE', True),
        ('1-2', '1-2'),
        ('--1', '--1'),
        ('²', '²'),
        ('nan', 'nan'),
        ('1.2.3', '1.2.3'),
        ('1e', '1e'),
        ('', ''),
    ],
)
def test_the_text_of_a_value_says_its_type(text, value):
    _, hyper = common.mechanism(f'axial+hyper={text}')
    assert hyper == {'hyper': value}
    assert type(hyper['hyper']) is type(value)


def test_a_float_or_none_is_given_as_text():
    name, hyper = common.mechanism('combiner_routing+decay=0.9')
    assert registry.make_mechanism(name, hyper).decay == 0.9
    given = common.attention('combiner_fixed+block=none', 48).to_dict()
    assert given == {'name': 'combiner_fixed', 'block': None}  # not the row of the data
    assert registry.make_mechanism(given.pop('name'), given).block is None
    published = {'combiner_routing': {'decay': 1}}
    assert common.attention('combiner_routing+decay=0.5', published=published).decay == 0.5


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('axial+columns', r"write NAME\+HYPER=VALUE, got 'columns'"),
        ('axial+', r"write NAME\+HYPER=VALUE, got ''"),
        ('axial+columns=1+columns=2', 'give columns once'),
    ],
)
def test_a_mechanism_written_otherwise_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        common.mechanism(text)


def test_a_scale_picks_one_of_four_and_small_is_as_cpu_unless_it_has_its_own():
    assert [common.at(scale)(1, 'two', None) for scale in common.SCALES] == [1, 'two', 'two', None]
    assert [common.at(scale)(1, 'two', 3, small=None) for scale in common.SCALES] == [1, 'two', None, 3]
    with pytest.raises(ValueError, match='scale=Full: choose full, cpu, small, quick'):
        common.at('Full')
