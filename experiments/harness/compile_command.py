"""The command line of scripts/compile.py, after it is parsed."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags

from combiner import cli, config_flag, messages, paths
from combiner import config as common
from combiner.aot import programs, targets
from combiner.core import registry
from experiments.harness import compile_report, compiling, errors
from experiments.harness.run import parse_config
from experiments.harness.timing import write_json

EXTRAS = {'tpu': 'tpu-aot', 'cuda': 'gpu-aot'}


@cli.guarded
def command(options: argparse.Namespace) -> None:
    """Compiles what the options of scripts/compile.py ask for; a mistake in them ends it with one line and status 2."""
    jax.config.update('jax_platforms', 'cpu')  # leaves an accelerator of this machine alone
    try:
        out = paths.local(options.json, '--json') if options.json else None
        if out and out.is_dir():
            raise ValueError(f'--json={out} is a folder; give the path of a file')
        target = targets.parse(options.target)
        target.devices()
    except targets.MissingCompilerError as error:
        mistake(f'{error}, or bash scripts/setup.sh {EXTRAS[targets.parse(options.target).chip.platform]}')
    except ValueError as error:
        mistake(str(error))
    messages.heading(device=f'{target}, which need not be present', config=options.config)
    try:
        if options.report:
            compile_report.make(_lengths(options), options.rows, compiles=not options.tables)
            messages.next_steps('git diff docs/accelerators.md')
            return
        for found in [_step(options, target)] if options.config else _attentions(options, target):
            if out:  # after every row, as the compiler may refuse the next one
                write_json(out, found)
    except jax.errors.JaxRuntimeError as error:
        cli.fail(f'the compiler refuses it: {errors.lines(error)[0]}', 1)
    run = options.config and messages.training(options.config, *options.settings)
    messages.next_steps(run or 'python scripts/bench.py  # time them, on this machine')


def mistake(message: str) -> NoReturn:
    """Reports a mistake in the options, and exits."""
    cli.fail(message, 2)


def _lengths(options: argparse.Namespace) -> list[int]:
    try:
        found = [int(text) for text in options.lengths.split(',')]
    except ValueError:
        mistake(f'--lengths={options.lengths}: write numbers separated by commas, such as 512,4096')
    if min(found) < 1:
        mistake(f'--lengths={options.lengths}: a length is at least 1')
    return found


def _step(options: argparse.Namespace, target: targets.Target) -> dict[str, Any]:
    path = Path(options.config.partition(':')[0])
    if not path.is_file() or path.suffix != '.py':
        mistake(f'config file {str(path)!r} does not exist; give the path of one, such as configs/photos.py')
    try:
        config = parse_config(['--config', options.config, *options.settings])
        programs.mesh(config, target)
    except (flags.Error, AttributeError, OSError, TypeError, ValueError) as error:
        mistake(config_flag.mistake(error))
    found = compiling.training_step(config, target)
    print(compiling.describe_step(options.config, found))
    return {'config': options.config, 'settings': options.settings, **found}


def _attentions(options: argparse.Namespace, target: targets.Target) -> Iterator[dict[str, Any]]:
    """Yields all that was compiled so far, after each row."""
    lengths, causal = _lengths(options), not options.bidirectional
    shape = {name: getattr(options, name) for name in ('tokens', 'heads', 'head_width')}
    kind = {'causal': causal, 'packed': options.packed}
    if min(shape.values()) < 1:
        mistake(f'--tokens, --heads and --head_width are at least 1, got {shape}')
    tokens = shape.pop('tokens')
    named = [f'+implementation={name}' for name in options.implementation.split(',') if name] or ['']
    asked = []
    try:
        for text in options.attention.split(','):
            for each in named:
                name, hyper = common.mechanism(text + each)
                registry.make_mechanism(name, hyper, causal=causal)
                asked += compiling.implementations(text + each, target.chip.platform)
    except ValueError as error:
        mistake(str(error))
    head = compiling.MODULE_HEAD if options.module else compiling.ATTENTION_HEAD
    print(f'{target}, bfloat16; compiled for it, not run on it', '', head, sep='\n')
    all_asked = [
        compiling.Attention(text, length, options.backward, str(target), max(tokens // length, 1), **kind, **shape)
        for length in lengths
        for text in asked
    ]
    rows = []
    for row in _modules(all_asked) if options.module else _costs(all_asked, options):
        rows.append(row)
        yield {'modules' if options.module else 'attention': rows}


def _costs(asked: list[compiling.Attention], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for one in asked:
        row = compiling.attention(one, kernels=options.schedule)
        print(compiling.describe_attention(row), flush=True)
        yield row


def _modules(asked: list[compiling.Attention]) -> Iterator[dict[str, Any]]:
    for one in asked:
        for rotary in (False, True):
            try:
                row = compiling.module(one, rotary=rotary)
            except (NotImplementedError, ValueError) as error:  # the mechanism has no such form
                mistake(errors.lines(error)[0])
            print(compiling.describe_module(row), flush=True)
            yield row
