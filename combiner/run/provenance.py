"""Where results come from: fingerprints of the data of a run, and the commit of this code.

With the fingerprints, results on other data are never taken for those of the run.

    WORKDIR/data.json   fingerprints of the splits, and of what they depend on, such as the tokenizer

Embedded text depends on the installed packages, and a data set may be prepared again with a different result: both
can change without a change of the config.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import jax
from absl import logging

from combiner import atomic, paths
from combiner.data import pipeline
from combiner.data.task import SPLITS, Task
from combiner.run import agreement

FILE = 'data.json'


def fingerprints(task: Task, data_dir: str | None) -> dict[str, str]:
    """Returns the fingerprints of all splits; the test split may be missing, as training does not need it.

    Raises:
        ValueError: see `open_split`.
        FileNotFoundError: a file of the training or validation split is missing.
    """
    found = {}
    for split in SPLITS:
        try:
            found |= of_split(task, split, data_dir)
        except (OSError, ValueError) as error:
            if split != 'test':
                raise
            logging.warning('the test split cannot be read (%s): evaluation will not know whether it changed', error)
    return found


def of_split(task: Task, split: str, data_dir: str | None) -> dict[str, str]:
    """Returns the fingerprints that results on one split depend on."""
    found = {split: pipeline.fingerprint(task, split, data_dir)}
    return found | (task.identity(split, data_dir) if task.identity else {})


def claim(workdir: str | os.PathLike[str], found: dict[str, str]) -> None:
    """Writes the fingerprints into a workdir, or checks that they equal the fingerprints of its run.

    Args:
        workdir: the run's folder.
        found: see `fingerprints`.

    Raises:
        ValueError: the run was trained with other data; the message lists all differences.
    """
    saved = load(workdir)
    if differing := _differences(saved, found):
        raise ValueError(
            f'{workdir} was trained with other data ({differing}); '
            'point config.data.data_dir at the data of this run, or choose another --workdir'
        )
    if jax.process_index() == 0 and found.items() - saved.items():
        atomic.write_text(paths.parse(workdir, 'workdir') / FILE, json.dumps(saved | found, indent=2) + '\n')


def of_all_processes(task: Task, data_dir: str | None) -> dict[str, str]:
    """Returns `fingerprints`, which are the same in all processes of this run; all of them must call it.

    Raises:
        ValueError: processes see different data; or as `fingerprints`.
        FileNotFoundError: as `fingerprints`.
    """
    found = fingerprints(task, data_dir)
    if differ := agreement.difference('; '.join(f'{name}: {value}' for name, value in found.items())):
        raise ValueError(
            f'the processes of this run see different data; process 0 has {differ.first}; process {differ.process} has '
            f'{differ.other}; give all hosts the same config.data.data_dir and the same versions of the packages'
        )
    return found


def check(
    workdir: str | os.PathLike[str], task: Task, split: str, data_dir: str | None, other_data: bool = False
) -> str:
    """Checks that a split has not changed since the training of the run.

    Args:
        workdir: the run's folder.
        task: of the run.
        split: the split that will be read.
        data_dir: the folder of the data sets.
        other_data: whether to accept other data.

    Returns:
        A suffix for the names of result files: '', or for other data '_other_data_' and 8 digits that identify it.

    Raises:
        ValueError: the split has changed, and `other_data` is false; see also `open_split`.
        FileNotFoundError: a file of the data set is missing.
    """
    saved, found = load(workdir), of_split(task, split, data_dir)
    if unknown := sorted(found.keys() - saved.keys()):
        logging.warning(
            '%s does not record the %s of its training: changes since then cannot be detected',
            paths.parse(workdir, 'workdir') / FILE,
            ' and the '.join(unknown),
        )
    differing = _differences(saved, found)
    if not differing:
        return ''
    if not other_data:
        raise ValueError(
            f'{workdir} was trained with other data ({differing}): the data set was prepared again, or the packages of '
            'embedded text have other versions. Use the data of the run, or give --other_data to accept these data: '
            'the results then go to separate files'
        )
    return f'_other_data_{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]}'


def load(workdir: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the fingerprints in a workdir; {} if it has none.

    Raises:
        ValueError: the file is not valid JSON.
    """
    path = paths.parse(workdir, 'workdir') / FILE
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(saved, dict):
            raise ValueError(f'{saved!r} is not an object')
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); restore it, or delete it to continue without') from None
    return saved


def commit() -> str | None:
    """Returns the commit of this code, with '-dirty' if it was changed since; None outside of its repository."""
    package = Path(__file__).resolve().parents[1]
    git = ('git', '-C', str(package))
    describe = (*git, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*')
    try:
        # An installed package may lie in the repository of something else, which does not track it.
        subprocess.run([*git, 'ls-files', '--error-unmatch', '__init__.py'], capture_output=True, check=True)
        return subprocess.run(describe, capture_output=True, encoding='utf-8', check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _differences(saved: dict[str, str], found: dict[str, str]) -> str:
    return '; '.join(
        f'{name}: {saved[name]} then, {found[name]} now'
        for name in found
        if name in saved and saved[name] != found[name]
    )
