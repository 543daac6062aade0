"""Prepares a data set in the data directory, completely or not at all; first shows the cost and asks.

    python -m combiner.data.prepare NAME [--data_dir DIR] [--yes]
    python -m combiner.data.prepare --list

The default of DIR is that of TFDS: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets. When started
again, the command skips data sets that are ready, keeps complete downloads and repeats incomplete work. Only one
process at a time may prepare data in a directory. TensorFlow prepares the sets of TFDS in a separate virtual
environment, which is created if it is missing (2.8 GB; --environment sets its folder). Reading needs no TensorFlow.
"""

import argparse
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from combiner import cli, messages, paths
from combiner.data import records, tfds_sources
from combiner.data.lra import generated
from combiner.data.task import SPLITS

# Packages of the environment: TFDS and its packages for this format; for C4 and Wiki-40B also Beam; the last three are
# required by TFDS's builder of C4. This project and its pins are not in it: apache-beam requires an older protobuf than
# TFDS's readers.
REQUIREMENTS = (
    'tensorflow-cpu',
    'tensorflow-datasets>=4.9.9',
    'array_record>=0.8',
    'importlib_resources>=6.4',
    'apache-beam',
    'langdetect',
    'nltk==3.8.1',
    'tldextract',
)
ENVIRONMENT_GB = 2.8
# Size and difficulty -> a remark on this Pathfinder.
REMARKS = {**{(size, 'easy'): ' (smaller than any of the benchmark)' for size in (12, 16)}, (128, 'hard'): ', Path-X'}
LINE = 100e6 / 8  # bytes/s of the network that estimates assume


@dataclass(frozen=True)
class Recipe:
    """The way to prepare one data set, and its cost.

    Attributes:
        what: one line about the data.
        marker: file or folder in the data directory that exists only if the set is complete.
        command: options -> the command that prepares the set.
        downloaded_gb: size of the download, in 10^9 bytes.
        written_gb: size of the set.
        scratch_gb: size of temporary files.
        hours: computing time on one ordinary core, without the download.
        note: other information for the user.
        tensorflow: whether the command runs in the environment with TensorFlow.
        verify: (data directory) -> a line that describes the set; raises ValueError or OSError if it cannot be read.
    """

    what: str
    marker: str
    command: Callable[[argparse.Namespace], list[str]]
    downloaded_gb: float
    written_gb: float
    scratch_gb: float
    hours: float
    note: str = ''
    tensorflow: bool = False
    verify: Callable[[str], str] = lambda data_dir: ''


def tfds_recipe(name: str, what: str, downloaded_gb: float, written_gb: float, hours: float, note: str = '') -> Recipe:
    """Returns the recipe of a set in `tfds_sources.SETS`; TFDS shuffles splits of over 1 GB in temporary files."""
    folder = tfds_sources.SETS[name].folder

    def command(options: argparse.Namespace) -> list[str]:
        beam = ['--beam_options', options.beam_options] if options.beam_options else []
        # -P: some modules in the script's folder have the names of Python's own modules.
        script = str(Path(__file__).with_name('prepare_tfds.py'))
        return [f'{options.environment}/bin/python', '-P', script, folder, '--data_dir', options.data_dir, *beam]

    def verify(data_dir: str) -> str:
        info = json.loads((Path(data_dir) / folder / 'dataset_info.json').read_text(encoding='utf-8'))
        sources = {split['name']: tfds_sources.open_tfds(name, split['name'], data_dir) for split in info['splits']}
        for source in sources.values():
            source[len(source) - 1]
        return ', '.join(f'{split} {len(source):,}' for split, source in sources.items()) + ' records'

    return Recipe(
        what=what,
        marker=f'{folder}/dataset_info.json',
        command=command,
        downloaded_gb=downloaded_gb,
        written_gb=written_gb,
        scratch_gb=written_gb if written_gb > 1 else 0.0,
        hours=hours,
        note=note,
        tensorflow=True,
        verify=verify,
    )


def generated_recipe(name: str, what: str, written_gb: float, hours: float) -> Recipe:
    """Returns the recipe of a set in `generated.NAMES`, with all its records."""

    def verify(data_dir: str) -> str:
        sources = {split: generated.open_split(name, split, data_dir) for split in SPLITS}
        return ', '.join(f'{split} {len(source):,}' for split, source in sources.items()) + ' records'

    return Recipe(
        what=what,
        marker=f'{generated.FOLDER}/{name}/{records.MANIFEST}',
        command=lambda options: [
            *(sys.executable, '-m', 'combiner.data.generate', name),
            *('--data_dir', options.data_dir),
        ],
        downloaded_gb=0.0,
        written_gb=written_gb,
        scratch_gb=0.0,
        hours=hours,
        note='Uses every core. If it is stopped, the same command continues.',
        verify=verify,
    )


# Size and difficulty -> GB and hours on one core, from the estimates of `combiner.data.generate`.
PATHFINDER = {
    (12, 'easy'): (0.06, 0.07),
    (16, 'easy'): (0.07, 0.07),
    (32, 'easy'): (0.16, 0.1),
    (32, 'intermediate'): (0.17, 0.1),
    (32, 'hard'): (0.17, 0.3),
    (64, 'easy'): (0.32, 0.3),
    (64, 'intermediate'): (0.33, 1.5),
    (64, 'hard'): (0.35, 30.0),
    (128, 'easy'): (0.5, 0.5),
    (128, 'intermediate'): (0.51, 0.3),
    (128, 'hard'): (0.55, 4.0),
    (256, 'easy'): (0.57, 0.9),
    (256, 'intermediate'): (0.6, 0.9),
    (256, 'hard'): (0.63, 0.7),
}

BY_HAND = 'If the download fails, get {} elsewhere and put them into DIR/downloads/manual: checksums are checked.'

# Downloads of images and reviews are from TFDS's lists of checksums; written sizes are from its catalogue, except both
# ImageNets (estimates) and C4 (of 3.0.1). For texts, the download is assumed to be as large as the set. C4's download
# and hours are T5's. Hours were measured for the first two and are estimates for the others.
RECIPES = {
    'cifar10': tfds_recipe('cifar10', 'CIFAR-10, 60,000 images 32x32 with 10 labels', 0.17, 0.14, 0.02),
    'imdb_reviews': tfds_recipe('imdb_reviews', 'IMDb movie reviews, 100,000, half labelled', 0.08, 0.14, 0.02),
    'downsampled_imagenet/64x64': tfds_recipe(
        'downsampled_imagenet/64x64',
        'ImageNet 64x64 as van den Oord et al. (2016) scaled it, 1,331,148 images',
        12.6,
        11.6,
        1.0,
        'Its addresses on image-net.org are reported dead (github.com/tensorflow/datasets, issue 4662). '
        + BY_HAND.format('train_64x64.tar and valid_64x64.tar'),
    ),
    'imagenet_resized/64x64': tfds_recipe(
        'imagenet_resized/64x64',
        'ImageNet 64x64 as Chrabaszcz et al. (2017) scaled it, 1,331,167 images with 1,000 labels; its pixels differ '
        'from downsampled_imagenet: results on the two do not compare',
        14.1,
        12.0,
        2.0,
        BY_HAND.format('Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip'),
    ),
    'wiki40b/en': tfds_recipe('wiki40b/en', 'Wiki-40B, 3.3 million articles of English Wikipedia', 10.6, 10.6, 1.5),
    'pg19': tfds_recipe('pg19', 'PG-19, 28,752 books published before 1919', 11.7, 11.7, 1.5),
    'c4/en': tfds_recipe(
        'c4/en',
        'C4, 365 million English web pages',
        7000.0,
        866.0,
        335.0 * 24,
        'It is too large for one machine: it needs a Beam cluster, which --beam_options names, and DIR in a file '
        "system that the cluster shares (--beam_options='--runner=FlinkRunner --flink_master=...').",
    ),
    'lra_listops': generated_recipe('lra_listops', 'Long Range Arena ListOps, 100,000 expressions', 0.14, 0.03),
    'lra_listops_short': generated_recipe(
        'lra_listops_short', '100,000 expressions of ListOps of 11 to 63 tokens; not of the benchmark', 0.03, 0.01
    ),
    **{
        f'lra_pathfinder{size}_{difficulty}': generated_recipe(
            f'lra_pathfinder{size}_{difficulty}',
            f'Long Range Arena Pathfinder, 200,000 images {size}x{size}{REMARKS.get((size, difficulty), "")}',
            *sizes,
        )
        for (size, difficulty), sizes in PATHFINDER.items()
    },
}


def parse() -> argparse.Namespace:
    """Parses the command line; without a name, it sets --list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', help='a data set; --list shows them')
    parser.add_argument(
        '--data_dir', type=paths.argument, default=tfds_sources.given_data_dir(), help='folder of the data sets'
    )
    parser.add_argument('--list', action='store_true', help='show the data sets and their sizes')
    parser.add_argument('--yes', action='store_true', help='do not ask')
    parser.add_argument('--ignore_space', action='store_true', help='start even if the disk seems too small')
    parser.add_argument('--beam_options', help='for c4/en: options of the Beam pipeline, in one argument')
    parser.add_argument(
        '--environment',
        type=paths.argument,
        default=str(paths.cache_dir() / 'prepare'),
        help='folder of the virtual environment with TensorFlow (default: %(default)s)',
    )
    options = parser.parse_args()
    options.list |= options.name is None
    if options.name and options.name not in RECIPES:
        parser.error(f'unknown data set {options.name!r}; known: {", ".join(RECIPES)}')
    if options.name == 'c4/en' and not options.beam_options:
        parser.error(f'{RECIPES[options.name].note} Meanwhile configs/text.py trains on embedded text.')
    options.data_dir = str(Path(options.data_dir).absolute())
    options.environment = str(Path(options.environment).absolute())
    return options


def listing() -> str:
    """Returns a table with one line per data set."""
    rows = [('name', 'download', 'on disk', 'data')]
    rows += [(name, gigabytes(r.downloaded_gb), gigabytes(r.written_gb), r.what) for name, r in RECIPES.items()]
    return '\n'.join(f'{name:31}  {fetched:>9}  {written:>9}  {what}' for name, fetched, written, what in rows)


def plan(recipe: Recipe, options: argparse.Namespace) -> str:
    """Returns a text about the cost of preparing a data set."""
    lines = [
        f'{options.name}: {recipe.what}.',
        f'Goes to {options.data_dir}: about {gigabytes(recipe.written_gb)}'
        + (f', and {gigabytes(recipe.scratch_gb)} of temporary files' if recipe.scratch_gb else ''),
    ]
    if recipe.downloaded_gb:
        fetching = messages.duration(recipe.downloaded_gb * 1e9 / LINE)
        lines.append(f'Downloads about {gigabytes(recipe.downloaded_gb)}, which takes {fetching} at 100 Mbit/s')
    lines.append(f'Computes for about {messages.duration(3600 * recipe.hours)} (one core; an estimate)')
    if recipe.tensorflow and not prepared(Path(options.environment)):
        lines.append(
            f'First creates {options.environment}, with TensorFlow: {gigabytes(ENVIRONMENT_GB)}, a few minutes, once'
        )
    return '\n'.join([*lines, recipe.note] if recipe.note else lines)


def gigabytes(size: float) -> str:
    """Formats a size, given in 10^9 bytes, with a suitable unit."""
    if size >= 1000:
        return f'{size / 1000:.1f} TB'
    return f'{1000 * size:.0f} MB' if size < 1 else f'{size:.1f} GB'


def check_space(recipe: Recipe, options: argparse.Namespace) -> None:
    """Exits if the disk is too small; it counts existing downloads again, hence --ignore_space."""
    wanted = {Path(options.data_dir): recipe.downloaded_gb + recipe.written_gb + recipe.scratch_gb}
    if recipe.tensorflow and not prepared(Path(options.environment)):
        wanted[Path(options.environment)] = ENVIRONMENT_GB
    for path, needed in wanted.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if free < needed:
            raise SystemExit(
                f'{options.name} needs about {gigabytes(needed)} in {path}, where {gigabytes(free)} are free; choose '
                'another --data_dir, or start anyway with --ignore_space'
            )


def confirm() -> None:
    """Asks whether to continue; exits if the answer is no."""
    if not sys.stdin.isatty():
        raise SystemExit('Cannot ask whether to continue, as there is no terminal; give --yes to start without asking')
    if input('Continue? [y/N] ').strip().lower() not in ('y', 'yes'):
        raise SystemExit('Nothing was done')


def prepared(environment: Path) -> bool:
    """Returns whether the environment is complete, with these requirements and for this Python."""
    stamp = environment / 'setup-done'
    return stamp.is_file() and stamp.read_text(encoding='utf-8') == contents()


def contents() -> str:
    """Returns what an environment consists of: Python's version and the requirements, one per line."""
    return '\n'.join([python_name(), *REQUIREMENTS]) + '\n'


def python_name() -> str:
    """Returns 'Python' and its version, on which the available packages depend."""
    return f'Python {sys.version_info.major}.{sys.version_info.minor}'


def make_environment(environment: Path) -> None:
    """Creates the environment with TensorFlow; replaces an incomplete one."""
    if prepared(environment):
        return
    with locked(environment.with_name(f'{environment.name}.lock'), f'creates {environment}'):
        if prepared(environment):  # by another process, meanwhile
            return
        print(f'Creating {environment} (a few minutes, once)', flush=True)
        shutil.rmtree(environment, ignore_errors=True)
        create = [sys.executable, '-m', 'venv', str(environment)]
        run(create, 'The environment could not be created; install python3-venv')
        pip = [str(environment / 'bin/python'), '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
        run(
            [*pip, *REQUIREMENTS],
            f'Packages could not be installed; is there a network, and TensorFlow for {python_name()}?',
        )
        (environment / 'setup-done').write_text(contents(), encoding='utf-8')


def run(command: list[str], failure: str) -> None:
    """Runs a command with its output on the terminal; exits with the message `failure` if it fails."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f'{failure} (exit code {done.returncode} of: {" ".join(command)})')


@contextmanager
def locked(path: Path, other: str) -> Iterator[None]:
    """Locks a file, or exits and says what the process that holds it does (`other`); its end releases the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f'Another process {other}; repeat when it has ended') from None
        yield


def remove_leftovers(recipe: Recipe, data_dir: Path) -> None:
    """Removes incomplete sets, downloads and unpacked files, which TFDS leaves when it is killed."""
    folder, downloads = (data_dir / recipe.marker).parent, data_dir / 'downloads'
    incomplete = [
        (folder.parent, f'incomplete.*_{folder.name}'),
        (downloads, '*.tmp.*'),
        (downloads / 'extracted', 'incomplete.*'),
    ]
    for path in (path for directory, name in incomplete for path in directory.glob(name)):
        print(f'Removing {path}, which is incomplete')
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def prepare(recipe: Recipe, options: argparse.Namespace) -> None:
    """Prepares the data set, unless it is ready, and checks that it can be read."""
    data_dir = Path(options.data_dir)
    again = f'repeat the command; complete downloads are kept in {data_dir}/downloads'
    started = time.monotonic()
    ready = (data_dir / recipe.marker).exists()
    if not ready:
        if recipe.tensorflow:
            make_environment(Path(options.environment))
            remove_leftovers(recipe, data_dir)
        run(recipe.command(options), f'{options.name} was not prepared; {again}')
        if not (data_dir / recipe.marker).exists():
            raise SystemExit(f'{options.name} was not prepared: {data_dir / recipe.marker} does not exist; {again}')
    try:
        found = recipe.verify(options.data_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(f'{options.name} cannot be used: {error}') from error
    took = 'was ready before' if ready else f'took {messages.duration(time.monotonic() - started)}'
    print(f'{options.name} is ready in {(data_dir / recipe.marker).parent}, {took}' + (f': {found}' if found else ''))
    if not ready and (data_dir / 'downloads').is_dir():
        print(f'Its downloads in {data_dir}/downloads are no longer needed')
    config = tfds_sources.CONFIGS.get(options.name) or [generated.config(options.name)]
    messages.next_steps(messages.training(*config, data_dir=data_dir))


@cli.guarded
def main() -> None:
    """Runs the command line."""
    options = parse()
    if options.list:
        print(listing())
        messages.next_steps('python -m combiner.data.prepare NAME --data_dir DIR')
        return
    recipe = RECIPES[options.name]
    messages.heading(data=options.name, folder=options.data_dir)
    if not (Path(options.data_dir) / recipe.marker).exists():
        print(plan(recipe, options), flush=True)
        if not options.ignore_space:
            check_space(recipe, options)
        if not options.yes:
            confirm()
    with locked(Path(options.data_dir) / '.prepare.lock', f'prepares a data set in {options.data_dir}'):
        prepare(recipe, options)


if __name__ == '__main__':
    main()
