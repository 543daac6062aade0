import pytest

from configs import c4_mlm, pg19, wiki40b

MODULES = {'wiki40b': wiki40b, 'pg19': pg19, 'c4_masked': c4_mlm}


@pytest.mark.parametrize('task', MODULES)
def test_table_3_as_the_authors_config_says(task):
    config = MODULES[task].get_config('attention=combiner_fixed')
    assert config.task == task
    assert (config.model.layers, config.model.width, config.model.heads, config.model.dtype) == (
        12,
        768,
        12,
        'bfloat16',
    )
    assert (config.steps, config.data.batch_size) == (125_000, 128)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps, config.optimizer.clip_norm) == (3e-4, 1e4, 1)
    assert config.data.options.to_dict() == {
        **{'length': 2048, 'vocab_size': 32_000, 'documents': 'joined', 'stride': 0, 'evaluation': 'stream'}
    }
    assert config.model.attention.to_dict() == {'name': 'combiner_fixed', 'block': 128}
    assert (config.model.dropout, config.model.attention_dropout, config.optimizer.weight_decay) == (0, 0, 0)
    assert (config.model.positions, config.model.tied, config.model.bias) == ('learned', True, 'all')


@pytest.mark.parametrize(
    ('scale', 'lengths', 'block'), [('full', (2048, 8192), 128), ('cpu', (512, 2048), 32), ('small', (256, 1024), 16)]
)
def test_a_step_has_as_many_tokens_at_any_length(scale, lengths, block):
    configs = [wiki40b.get_config(f'attention=axial,length={length},scale={scale}') for length in (2048, 8192)]
    assert tuple(config.data.options.length for config in configs) == lengths
    assert len({config.data.batch_size * config.data.options.length for config in configs}) == 1
    assert all(config.model.attention.columns == block for config in configs)


def test_blocks_of_bigbird_are_its_own_papers():
    for scale, block in (('full', 64), ('cpu', 16), ('quick', 4)):
        assert c4_mlm.get_config(f'attention=bigbird,scale={scale}').model.attention.block == block
    assert c4_mlm.get_config('attention=bigbird+block=32').model.attention.block == 32


def test_routing_is_that_of_its_authors_code_for_text():
    for length, clusters in ((2048, 4), (8192, 16), (128, 1)):
        attention = wiki40b.get_config(f'attention=routing,length={length}').model.attention.to_dict()
        assert attention == {'name': 'routing', 'local_heads': 6, 'block': 256, 'clusters': clusters, 'window': 512}
    attention = c4_mlm.get_config('attention=combiner_routing').model.attention.to_dict()
    assert attention == {'name': 'combiner_routing', 'clusters': 4, 'block': 512}
    attention = wiki40b.get_config('attention=routing,scale=quick').model.attention.to_dict()
    assert attention == {'name': 'routing', 'local_heads': 1, 'block': 16, 'clusters': 4, 'window': 32}


def test_small_masked_models_read_the_embedded_prose():
    assert c4_mlm.get_config('scale=small').task == 'prose_masked'
    assert c4_mlm.get_config('scale=cpu').task == 'c4_masked'


@pytest.mark.parametrize('length', [1, 1000, 524_288])
def test_a_length_that_does_not_divide_is_refused(length):
    with pytest.raises(ValueError, match=f'length={length}: choose a power of two from 2 to 262144'):
        wiki40b.get_config(f'length={length}')
    with pytest.raises(ValueError, match='from 32 to 16384'):
        wiki40b.get_config(f'length={length},scale=quick')
