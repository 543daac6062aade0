"""Exports the model of a run: weights, config and model card in a folder, in the layout of the Hugging Face hub.

    python -m combiner.export --workdir DIR --out DIR [--parameters latest|best|ema] [--license ID] [--data_dir DIR]

`combiner.load(DIR)` gives the model back. `combiner.weights` describes the files. The folder appears when it is
complete. The model card has the figures of the evaluations in the workdir, if they are of the same parameters. No
network is used.
"""

import os
import re
import shlex
from pathlib import Path

import jax
from absl import flags, logging

import combiner
from combiner import atomic, cli, evaluate, messages, model_card, paths, sharding, weights
from combiner.data.text.tokenizer import Tokenizer
from combiner.run import provenance


def export(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    parameters: str = 'latest',
    *,
    licence: str = model_card.UNKNOWN_LICENCE,
    data_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Exports the model of a run and returns the new folder.

    Args:
        workdir: the run's folder.
        out: a local folder, which does not exist yet or is empty.
        parameters: see `evaluate.load`.
        licence: of the weights, as the Hugging Face hub writes it, such as cc-by-4.0.
        data_dir: folder of the data sets, which holds the tokenizer; None for the one used in training.

    Raises:
        ValueError: as `evaluate.load`; `out` is not empty, or the licence malformed; or the tokenizer of the training
            is not there.
        OSError: `out` cannot be written, or the disk is full.
    """
    target = paths.local(out, 'out').absolute()
    _check_empty(target)
    if not re.fullmatch(r'[a-z0-9.+-]+', licence):
        raise ValueError(f'license {licence!r}: give an identifier as the Hugging Face hub does, such as cc-by-4.0')
    trained = evaluate.load(workdir, parameters, sharding.make_mesh(devices=jax.local_devices()[:1]), data_dir)
    evaluate.show_start(trained, workdir, parameters)
    tokenizer = _tokenizer(workdir, trained)
    config = describe(trained, parameters, tokenizer)
    measured, other = model_card.evaluations(workdir, parameters, trained.step)
    if other:
        logging.info('not in the model card, as of other parameters than these: %s', ', '.join(other))
    card = model_card.text(
        target.name,
        config,
        dataset=trained.task.dataset,
        parameters=weights.count(trained.variables),
        measured=measured,
        fingerprints=provenance.load(workdir),
        code=code_version(),
        licence=licence,
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.variables))
    try:
        with (
            paths.full_disk_explained(target.parent, 'the weights', size, 'make room, or give another --out'),
            atomic.new_folder(target) as folder,
        ):
            weights.save(folder, trained.variables, config, tokenizer)
            (folder / weights.CARD).write_text(card, encoding='utf-8')
    except OSError as error:
        if paths.is_full(error):
            raise
        raise paths.unwritable(target, error, 'give another --out') from None
    return target


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ValueError(f'out {str(folder)!r} exists and is no empty folder; remove it, or give another --out')


def _tokenizer(workdir: str | os.PathLike[str], trained: evaluate.Trained) -> Tokenizer | None:
    """Returns the tokenizer of a run, if it has one; raises ValueError unless it is that of the training."""
    if trained.task.tokenizer is None:
        return None
    way_out = 'give the folder of the prepared data as --data_dir (or in COMBINER_CACHE)'
    file = trained.task.tokenizer(trained.config.data.data_dir)
    if not file.is_file():
        raise ValueError(f'the tokenizer of the training is not at {file}; {way_out}')
    tokenizer = Tokenizer.load(file)
    wanted = provenance.load(workdir).get('tokenizer', tokenizer.fingerprint)
    if tokenizer.fingerprint != wanted:
        raise ValueError(
            f'{file} is not the tokenizer of the training (fingerprint {tokenizer.fingerprint}, not {wanted}); '
            f'{way_out}'
        )
    return tokenizer


def describe(trained: evaluate.Trained, parameters: str = 'latest', tokenizer: Tokenizer | None = None) -> dict:
    """Returns the content of config.json, by the keys of `weights.FIELDS`."""
    task, run = trained.task, trained.config.to_dict()
    run['data']['data_dir'] = run['init_from'] = None  # paths of the machine that trained
    return {
        'model_type': weights.MODEL_TYPE,
        'format': weights.FORMAT,
        'version': combiner.__version__,
        'head': task.head,
        'vocab_size': task.vocab_size,
        'shape': list(task.shape),
        'classes': task.classes,
        'packed': task.packed,
        'input_shape': list(task.input_shape),
        'model': run.pop('model'),
        'tokenizer': None if tokenizer is None else tokenizer.fingerprint,
        'training': {'step': trained.step, 'parameters': parameters, 'config': run},
    }


def code_version() -> str:
    """Returns the version of this package, with the commit if it is known."""
    commit = provenance.commit()
    return f'combiner {combiner.__version__}' + (f', commit {commit}' if commit else '')


def command() -> None:
    """Runs the command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    out = flags.DEFINE_string('out', None, 'New folder for the exported model.', required=True)
    parameters = flags.DEFINE_enum('parameters', 'latest', evaluate.PARAMETERS, "Which of the run's parameters.")
    licence = flags.DEFINE_string(
        'license', model_card.UNKNOWN_LICENCE, 'Licence of the weights, as the Hugging Face hub writes it: cc-by-4.0 …'
    )
    data_dir = flags.DEFINE_string('data_dir', None, 'Where the tokenizer lies; by default as in training.')

    def main() -> None:
        messages.heading(device=f'1 device ({jax.local_devices()[0].device_kind})')
        folder = export(workdir.value, out.value, parameters.value, licence=licence.value, data_dir=data_dir.value)
        print(f'wrote {folder}')
        messages.next_steps(
            shlex.join(['python', '-c', f'import combiner; print(combiner.load({str(folder)!r}).model)'])
        )

    cli.run(main)


if __name__ == '__main__':
    command()
