"""Prepares a data set: says what that takes, asks, and leaves it in the data directory whole or not at all.

    python -m combiner.data.prepare NAME [--data_dir DIR] [--yes]
    python -m combiner.data.prepare --list

DIR is by default where TFDS looks: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets. Started again,
it prepares nothing that is ready, keeps what was downloaded whole and does anew what was left half done. One process
works in a data directory at a time. The sets of TFDS are prepared by TensorFlow, in a virtual environment of its own,
which is made when it is missing (2.8 GB; --environment says where); reading them later needs no TensorFlow.
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

from combiner import cli, paths
from combiner.data import records, tfds_sources
from combiner.data.lra import generated
from combiner.data.task import SPLITS

# What the environment holds: not this project, and no pins of its own, as apache-beam asks for an older protobuf than
# TFDS's readers. TFDS, and what it reads and writes this format with; for C4 and Wiki-40B also Beam; the last three as
# TFDS's builder of C4 asks for them.
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
# Size and difficulty -> what else is to be said of a Pathfinder.
REMARKS = {(16, 'easy'): ' (smaller than any of the benchmark)', (128, 'hard'): ', Path-X'}
LINE = 100e6 / 8  # bytes/s of the network that times are given for


@dataclass(frozen=True)
class Recipe:
    """How one data set is made.

    Attributes:
        what: one line about the data.
        place: file or folder below the data directory that is there when the set is whole, and only then.
        command: options -> the command that makes it.
        downloaded_gb: size of what is fetched, in 10^9 bytes.
        written_gb: size of the set.
        scratch_gb: size of what is written on the way and removed.
        hours: of computing, on one ordinary core, beside the download.
        note: what else to know beforehand.
        tensorflow: whether the command runs in the environment with TensorFlow.
        verify: (data directory) -> a line that says what is there; raises ValueError or OSError if it cannot be read.
    """

    what: str
    place: str
    command: Callable[[argparse.Namespace], list[str]]
    downloaded_gb: float
    written_gb: float
    scratch_gb: float
    hours: float
    note: str = ''
    tensorflow: bool = False
    verify: Callable[[str], str] = lambda data_dir: ''


def tfds_recipe(name: str, what: str, downloaded_gb: float, written_gb: float, hours: float, note: str = '') -> Recipe:
    """The recipe of a set of `tfds_sources.SETS`. TFDS shuffles a split of more than 1 GB in files beside it."""
    folder = tfds_sources.SETS[name].folder

    def command(options: argparse.Namespace) -> list[str]:
        beam = ['--beam_options', options.beam_options] if options.beam_options else []
        # -P: the folder of the script has modules named as some of Python's own.
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
        place=f'{folder}/dataset_info.json',
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
    """The recipe of a set of `generated.NAMES`; without a limit, so that it is the whole set."""

    def verify(data_dir: str) -> str:
        sources = {split: generated.open_split(name, split, data_dir) for split in SPLITS}
        return ', '.join(f'{split} {len(source):,}' for split, source in sources.items()) + ' records'

    return Recipe(
        what=what,
        place=f'{generated.FOLDER}/{name}/{records.MANIFEST}',
        command=lambda options: [
            *(sys.executable, '-m', 'combiner.data.generate', name),
            *('--data_dir', options.data_dir),
        ],
        downloaded_gb=0.0,
        written_gb=written_gb,
        scratch_gb=0.0,
        hours=hours,
        note='Uses every core. Stopped at any point, the same command goes on.',
        verify=verify,
    )


# Size and difficulty -> GB and hours on one core, as `combiner.data.generate` estimates them.
PATHFINDER = {
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

BY_HAND = 'If the download fails, fetch {} elsewhere and put them into DIR/downloads/manual: checksums are checked.'

# NAME -> how it is prepared. Downloads of images and reviews are as in TFDS's lists of checksums, and what is written
# as in its catalogue, but for both ImageNets (estimates) and C4 (of 3.0.1); texts are taken to be as large before as
# after. C4's download and hours are T5's. Hours were measured for the first two and are estimates for the others.
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
        'ImageNet 64x64 as Chrabaszcz et al. (2017) scaled it, 1,331,167 images with 1,000 labels; other pixels than '
        'downsampled_imagenet: figures on the two do not compare',
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
        'No single machine prepares it: it needs a Beam cluster, which --beam_options names, and DIR in a file system '
        "that it shares (--beam_options='--runner=FlinkRunner --flink_master=...').",
    ),
    'lra_listops': generated_recipe('lra_listops', 'Long Range Arena ListOps, 100,000 expressions', 0.14, 0.03),
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
    """The command line; without a name, --list is set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', nargs='?', help='a data set; --list shows them')
    parser.add_argument(
        '--data_dir', type=paths.argument, default=tfds_sources.default_data_dir(), help='where data sets lie'
    )
    parser.add_argument('--list', action='store_true', help='show the data sets and what they take')
    parser.add_argument('--yes', action='store_true', help='do not ask')
    parser.add_argument('--ignore_space', action='store_true', help='start even if the disk seems too small')
    parser.add_argument('--beam_options', help='for c4/en: options of the Beam pipeline, in one argument')
    parser.add_argument(
        '--environment',
        type=paths.argument,
        default=str(tfds_sources.cache_dir() / 'prepare'),
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
    """A line for each data set."""
    rows = [('name', 'download', 'on disk', 'data')]
    rows += [(name, gigabytes(r.downloaded_gb), gigabytes(r.written_gb), r.what) for name, r in RECIPES.items()]
    return '\n'.join(f'{name:31}  {fetched:>9}  {written:>9}  {what}' for name, fetched, written, what in rows)


def plan(recipe: Recipe, options: argparse.Namespace) -> str:
    """What preparing takes, to be read before it starts."""
    lines = [
        f'{options.name}: {recipe.what}.',
        f'Goes to {options.data_dir}: about {gigabytes(recipe.written_gb)}'
        + (f', and {gigabytes(recipe.scratch_gb)} more on the way' if recipe.scratch_gb else ''),
    ]
    if recipe.downloaded_gb:
        fetching = duration(recipe.downloaded_gb * 1e9 / LINE)
        lines.append(f'Downloads about {gigabytes(recipe.downloaded_gb)}, which takes {fetching} at 100 Mbit/s')
    lines.append(f'Computes for about {duration(3600 * recipe.hours)} (one core; an estimate)')
    if recipe.tensorflow and not prepared(Path(options.environment)):
        lines.append(
            f'First makes {options.environment}, with TensorFlow: {gigabytes(ENVIRONMENT_GB)}, a few minutes, once'
        )
    return '\n'.join([*lines, recipe.note] if recipe.note else lines)


def gigabytes(size: float) -> str:
    """A size in units that read well, from 10^9 bytes."""
    if size >= 1000:
        return f'{size / 1000:.1f} TB'
    return f'{1000 * size:.0f} MB' if size < 1 else f'{size:.1f} GB'


def duration(seconds: float) -> str:
    """A duration in units that read well."""
    for unit, length in (('days', 86_400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.0f} {unit}'
    return f'{seconds:.0f} seconds'


def check_space(recipe: Recipe, options: argparse.Namespace) -> None:
    """Stops before a disk would fill up. What is downloaded already is counted again, hence --ignore_space."""
    wanted = {Path(options.data_dir): recipe.downloaded_gb + recipe.written_gb + recipe.scratch_gb}
    if recipe.tensorflow and not prepared(Path(options.environment)):
        wanted[Path(options.environment)] = ENVIRONMENT_GB
    for path, needed in wanted.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if free < needed:
            raise SystemExit(
                f'{options.name} needs about {gigabytes(needed)} in {path}, where {gigabytes(free)} are free; choose '
                'another --data_dir, or start all the same: --ignore_space'
            )


def confirm() -> None:
    """Asks whether to go on."""
    if not sys.stdin.isatty():
        raise SystemExit('There is no one to ask whether to go on; --yes goes on without')
    if input('Go on? [y/N] ').strip().lower() not in ('y', 'yes'):
        raise SystemExit('Nothing was done')


def prepared(environment: Path) -> bool:
    """Whether the environment was made whole, of these requirements and for this Python."""
    stamp = environment / 'setup-done'
    return stamp.is_file() and stamp.read_text(encoding='utf-8') == contents()


def contents() -> str:
    """What an environment is made of: Python's version and the requirements, a line each."""
    return '\n'.join([python_name(), *REQUIREMENTS]) + '\n'


def python_name() -> str:
    """Python with its version, which decides what can be installed."""
    return f'Python {sys.version_info.major}.{sys.version_info.minor}'


def make_environment(environment: Path) -> None:
    """Makes the environment with TensorFlow; one that was cut short is made anew."""
    if prepared(environment):
        return
    print(f'Making {environment} (a few minutes, once)', flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    run([sys.executable, '-m', 'venv', str(environment)], 'The environment could not be made; is python3-venv there?')
    pip = [str(environment / 'bin/python'), '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
    run(
        [*pip, *REQUIREMENTS],
        f'The environment could not be filled; is there a network, and TensorFlow for {python_name()}?',
    )
    (environment / 'setup-done').write_text(contents(), encoding='utf-8')


def run(command: list[str], failure: str) -> None:
    """Runs a command; its output goes to the terminal."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f'{failure} (exit code {done.returncode} of: {" ".join(command)})')


@contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Holds a lock on the data directory, which the system lets go of however the process ends."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / '.prepare.lock').open('w', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f'Another process prepares a data set in {data_dir}; try again when it is done') from None
        yield


def remove_leftovers(recipe: Recipe, data_dir: Path) -> None:
    """Removes what TFDS had under way when it was killed: a set half written, files half fetched or unpacked."""
    folder, downloads = (data_dir / recipe.place).parent, data_dir / 'downloads'
    half = [
        (folder.parent, f'incomplete.*_{folder.name}'),
        (downloads, '*.tmp.*'),
        (downloads / 'extracted', 'incomplete.*'),
    ]
    for left in (path for where, name in half for path in where.glob(name)):
        print(f'Removing {left}, which was left half done')
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def prepare(recipe: Recipe, options: argparse.Namespace) -> None:
    """Makes the data set, unless it is ready, and reads from it."""
    data_dir = Path(options.data_dir)
    again = f'start again with the same command; what was downloaded whole is kept in {data_dir}/downloads'
    started = time.monotonic()
    ready = (data_dir / recipe.place).exists()
    if not ready:
        if recipe.tensorflow:
            make_environment(Path(options.environment))
            remove_leftovers(recipe, data_dir)
        run(recipe.command(options), f'{options.name} was not prepared; {again}')
        if not (data_dir / recipe.place).exists():
            raise SystemExit(f'{options.name} was not prepared: {data_dir / recipe.place} is not there; {again}')
    try:
        found = recipe.verify(options.data_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(f'{options.name} is there, but cannot be read: {error}') from error
    took = 'was ready before' if ready else f'took {duration(time.monotonic() - started)}'
    print(f'{options.name} is ready in {(data_dir / recipe.place).parent}, {took}' + (f': {found}' if found else ''))
    if not ready and (data_dir / 'downloads').is_dir():
        print(f'What was downloaded for it, to {data_dir}/downloads, is no longer needed')


@cli.guarded
def main() -> None:
    """The command line."""
    options = parse()
    if options.list:
        print(listing())
        return
    recipe = RECIPES[options.name]
    if not (Path(options.data_dir) / recipe.place).exists():
        print(plan(recipe, options), flush=True)
        if not options.ignore_space:
            check_space(recipe, options)
        if not options.yes:
            confirm()
    with alone(Path(options.data_dir)):
        prepare(recipe, options)


if __name__ == '__main__':
    main()
