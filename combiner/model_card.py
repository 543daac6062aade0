"""The model card of an exported model: README.md with the YAML that the Hugging Face hub reads.

https://huggingface.co/docs/hub/model-cards describes the fields. The hub's own licence field for weights whose licence
nobody has chosen is `unknown`.
"""

import json
import math
import os
import re
from typing import Any, NamedTuple

import yaml

from combiner import metrics, paths

LIBRARY = 'combiner-jax'
UNKNOWN_LICENCE = 'unknown'

# The hub's names of what a model does: with images, and with other sequences.
_KINDS = {
    'language_model': ('unconditional-image-generation', 'text-generation'),
    'masked_language_model': ('fill-mask', 'fill-mask'),
    'classifier': ('image-classification', 'text-classification'),
    'dual_encoder': ('image-classification', 'text-classification'),
}
_LOGITS = {
    'language_model': 'logits [batch, length, vocabulary] of the tokens themselves, each given the tokens before it',
    'masked_language_model': 'logits [batch, length, vocabulary] of the token at each position, given all tokens',
    'classifier': 'logits [batch, classes]',
    'dual_encoder': 'logits [batch, classes] of each pair of sequences',
}


class Evaluation(NamedTuple):
    """Figures of an evaluation of the exported parameters.

    Attributes:
        split: of the data set.
        name: of the evaluation, for tasks that have several; '' otherwise.
        values: of the figures, by name.
        examples: as text, such as '64 of 1,853'.
        context: of a prediction.
        command: that measured them.
    """

    split: str
    name: str
    values: dict[str, float]
    examples: str
    context: str
    command: str


def evaluations(workdir: str | os.PathLike[str], parameters: str, step: int) -> tuple[list[Evaluation], list[str]]:
    """Reads the evaluations in a workdir; returns those of these parameters, and the names of the other files.

    Args:
        workdir: the run's folder.
        parameters: `latest`, `best` or `ema`.
        step: of their checkpoint.
    """
    found, other = [], []
    for file in sorted(paths.parse(workdir, 'workdir').glob('evaluation_*.json'), key=str):
        try:
            result = json.loads(file.read_text(encoding='utf-8'))
            if (result['parameters'], result['step']) != (parameters, step):
                raise ValueError('other parameters')
            new = [_evaluation(file.name, result, name) for name in result.get('evaluations', ('',))]
        except (KeyError, TypeError, ValueError):
            other.append(file.name)
        else:
            found += new
    return found, other


def _evaluation(file: str, result: dict[str, Any], name: str) -> Evaluation:
    figures = result['evaluations'][name] if name else result
    command = (
        f'combiner-evaluate --workdir WORKDIR --split={result["split"]} --parameters={result["parameters"]}'
        f'{" --other_data" if "_other_data_" in file else ""}'
    )
    if limited := re.search(r'_(\d+)_examples\.json$', file):
        command += f' --examples={limited[1]}'
    examples, in_all = figures['examples'], figures['of_examples']
    return Evaluation(
        result['split'],
        name,
        {metric: figures[metric] for metric in result['metrics'] if metric in figures},
        f'{examples:,} of {in_all:,}' if examples < in_all else f'{examples:,}',
        figures['context'],
        command,
    )


def text(
    name: str,
    config: dict[str, Any],
    *,
    dataset: str,
    parameters: int,
    measured: list[Evaluation],
    fingerprints: dict[str, str],
    code: str,
    licence: str = UNKNOWN_LICENCE,
) -> str:
    """Returns the model card.

    Args:
        name: of the model: the name of its folder.
        config: the content of config.json (see `combiner.weights`).
        dataset: full name of the data set.
        parameters: their number.
        measured: the evaluations of these parameters.
        fingerprints: of the training data.
        code: version and commit of the package that exported the model.
        licence: of the weights, as the hub writes it.
    """
    header = yaml.safe_dump(_front_matter(name, config, dataset, measured, licence), sort_keys=False, width=120)
    sections = (
        f'# {name}',
        _summary(config, dataset, parameters),
        f'## Use\n\n{_use(name, config)}',
        f'## Data\n\n{_data(config, dataset, fingerprints)}',
        f'## Training\n\n{_training(config, code)}',
        f'## Figures\n\n{_figures(measured)}',
        f'## Limits\n\n{_limits(config, licence)}',
    )
    return f'---\n{header}---\n\n' + '\n\n'.join(sections) + '\n'


def _front_matter(
    name: str, config: dict[str, Any], dataset: str, measured: list[Evaluation], licence: str
) -> dict[str, Any]:
    task, kind = config['training']['config']['task'], _kind(config)
    results = [
        {
            'task': {'type': kind},
            'dataset': {
                'type': task,
                'name': dataset + (f', evaluation of {each.name}' if each.name else ''),
                'split': each.split,
            },
            'metrics': [
                {'type': metric, 'value': value, 'args': {'command': each.command}}
                for metric, value in each.values.items()
                if math.isfinite(value)
            ],
        }
        for each in measured
    ]
    results = [result for result in results if result['metrics']]
    header = {
        'license': licence,
        'library_name': LIBRARY,
        'pipeline_tag': kind,
        'tags': ['combiner', 'jax', 'flax', _attention(config)],
        'datasets': [task],
    }
    if results:
        header['metrics'] = sorted({metric['type'] for result in results for metric in result['metrics']})
        header['model-index'] = [{'name': name, 'results': results}]
    return header


def _kind(config: dict[str, Any]) -> str:
    """Returns the hub's name of what the model does; images have several axes, other sequences one."""
    return _KINDS[config['head']][0 if len(config['shape']) > 1 else 1]


def _attention(config: dict[str, Any]) -> str:
    return config['model']['attention']['name']


def _summary(config: dict[str, Any], dataset: str, parameters: int) -> str:
    head = config['head'].replace('_', ' ')
    return (
        f'A {head} (Transformer, {parameters:,} parameters) with the attention `{_attention(config)}`, trained on '
        f'{dataset} with the Python package `{LIBRARY}`, an implementation of "Combiner: Full Attention Transformer '
        'with Sparse Computation Cost" (Ren et al., NeurIPS 2021, '
        '[arXiv:2107.05768](https://arxiv.org/abs/2107.05768)).'
    )


def _use(name: str, config: dict[str, Any]) -> str:
    axes = ', '.join(map(str, ['batch', *config['input_shape']]))
    lines = [
        '```python',
        'import combiner',
        '',
        f"model, variables, config, tokenizer = combiner.load('{name}')  # this folder",
        f'logits = model.apply(variables, tokens)  # tokens: integers [{axes}]',
        '```',
        '',
        f'It returns {_LOGITS[config["head"]]}. Tokens are 0 to {config["vocab_size"] - 1:,}.',
    ]
    if config['tokenizer']:
        lines[-1] += ' `tokenizer.encode([text])` and `tokenizer.decode(ids)` convert text and tokens.'
    if config['head'] == 'language_model':
        lines[-1] += ' `combiner.sample.complete` continues sequences.'
    if ':' in _attention(config):
        module = _attention(config).partition(':')[0]
        lines.append(
            f'\nThe attention is code of its own, which is not in this folder: the module `{module}` must be '
            'importable.'
        )
    return '\n'.join(lines)


def _data(config: dict[str, Any], dataset: str, fingerprints: dict[str, str]) -> str:
    run = config['training']['config']
    options = ', '.join(f'{key}={value}' for key, value in run['data']['options'].items())
    lines = [f'- data set: {dataset}', f'- task: `{run["task"]}`{f", with {options}" if options else ""}']
    lines += [f'- fingerprint of {name.replace("_", " ")}: `{value}`' for name, value in fingerprints.items()]
    return '\n'.join(lines)


def _training(config: dict[str, Any], code: str) -> str:
    training, run = config['training'], config['training']['config']
    step, batch = training['step'], run['data']['batch_size']
    tokens = step * batch * math.prod(config['input_shape'])
    optimizer = run['optimizer']
    return '\n'.join(
        [
            f'- {step:,} of {run["steps"]:,} steps with {batch:,} examples each: {tokens:,} tokens, seed {run["seed"]}',
            f'- parameters: `{training["parameters"]}`',
            f'- optimizer: {optimizer["name"]}, learning rate {optimizer["learning_rate"]:g} ({optimizer["schedule"]})',
            f'- exported by {code}',
            '',
            'All settings are in `config.json`: those of the model under `model`, the others under `training`.',
        ]
    )


def _figures(measured: list[Evaluation]) -> str:
    if not measured:
        return 'These parameters have not been evaluated.'
    lines = ['| split | figures | examples | each target given | command |', '|---|---|---|---|---|']
    for each in measured:
        figures = ', '.join(metrics.headline(each.values, [metric]) for metric in each.values) or 'no targets'
        split = f'{each.split}, {each.name}' if each.name else each.split
        lines.append(f'| {split} | {figures} | {each.examples} | {each.context} | `{each.command}` |')
    return '\n'.join(lines) + '\n\nWORKDIR is the folder of the training run.'


def _limits(config: dict[str, Any], licence: str) -> str:
    longest = math.prod(config['shape'])
    lines = [
        f'- Sequences have at most {longest:,} tokens.',
        '- It was trained on the data above alone, and this card, which a program wrote, knows of no evaluation but '
        'those above: none on other data, of bias, of harmful output, or of what it repeats of its training data.',
    ]
    if licence == UNKNOWN_LICENCE:
        lines.append('- No licence was chosen for these weights. The licences of the data may restrict their use.')
    return '\n'.join(lines)
