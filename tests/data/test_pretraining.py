"""Pretraining reads the sequences of a classification, hides none of its padding's places, and never its label."""

import numpy as np
import pytest

from combiner import build, models
from combiner.data import tasks
from combiner.data.task import open_split
from configs import lra

NAMES = ('lra_listops', 'lra_text', 'lra_retrieval', 'lra_image', 'lra_pathfinder')
PADDED = NAMES[:3]


def first(task, data_dir):
    return task.transform(open_split(task, 'test', data_dir)[0])


@pytest.mark.parametrize('name', NAMES)
def test_masked_examples_have_the_tokens_of_the_classification(data_dir, name):
    plain, masked = tasks.make(name), tasks.make(name, pretrain='mlm')
    classified, example = first(plain, data_dir), first(masked, data_dir)
    tokens, valid = (classified[key].reshape(-1, masked.length)[0] for key in ('tokens', 'valid'))
    np.testing.assert_array_equal(example['targets'], tokens)
    hidden = masked.randomise(example, np.random.default_rng(0))
    changed = hidden['tokens'] != tokens
    assert changed.any()
    assert (hidden['weights'][changed] == 1).all()
    assert not hidden['weights'][~valid].any()
    assert masked.vocab_size == plain.vocab_size + 1
    assert (hidden['tokens'] == plain.vocab_size).sum() > 0.5 * hidden['weights'].sum()
    others = hidden['tokens'][changed & (hidden['tokens'] < plain.vocab_size)]
    assert others.size == 0 or others.min() >= (name in PADDED)


@pytest.mark.parametrize('name', NAMES)
def test_causal_examples_predict_all_but_padding(data_dir, name):
    task = tasks.make(name, pretrain='causal')
    example = first(task, data_dir)
    assert (task.head, task.randomise, task.vocab_size) == ('language_model', None, tasks.make(name).vocab_size)
    np.testing.assert_array_equal(example['weights'], example['valid'])
    np.testing.assert_array_equal(example['targets'], example['tokens'])


@pytest.mark.parametrize(('kind', 'model'), [('mlm', models.MaskedLanguageModel), ('causal', models.LanguageModel)])
@pytest.mark.parametrize('task', lra.TASKS)
def test_the_config_of_every_task_can_be_pretrained(task, kind, model):
    config = lra.get_config(f'task={task},attention=combiner_fixed,pretrain={kind},scale=small')
    assert isinstance(build.model(config, build.task(config)), model)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="unknown pretrain='bert'; choose none, mlm, causal"):
        build.task(lra.get_config('pretrain=bert'))
