"""One run of a row: its commands, the files that they leave, and its measurements.

A run's folder is a workdir of `combiner.train`. Besides config.json, metrics.jsonl, checkpoints and the evaluation of
the test split it holds the output of the commands (log.txt) and one line for each command that ended (commands.jsonl):
exit status, wall-clock seconds, peak memory, device, versions and commit. A training that was finished before has none.
"""

import fcntl
import functools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

from absl import flags
from ml_collections import config_flags

from combiner import build
from combiner.run import provenance, saved_config
from experiments.harness.row import Row

# How the last line of a training begins that has diverged: see `combiner.monitoring.log`.
_DIVERGED = ('error: training diverged', 'error: validation_loss_nats')
ROOT = Path(__file__).parents[2]
EVALUATION = 'evaluation_test_latest.json'
OF_EVALUATION = ('dataset', 'examples', 'evaluated_on', 'context', 'codecs_bits_per_dim')


def slug(text: str) -> str:
    """Returns the text in lower-case letters, digits and single hyphens, for the name of a file."""
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


@dataclass(frozen=True)
class Run:
    """A row with one seed, at one scale.

    Attributes:
        row: the row.
        scale: one of `combiner.config.SCALES`.
        seed: of the parameters and of the order of the data.
        workdir: the run's folder.
        data_dir: folder of prepared data sets; None for the config's own.
    """

    row: Row
    scale: str
    seed: int
    workdir: Path
    data_dir: str | None = None

    def __str__(self) -> str:
        return f'{self.row.column}, {self.row.model}, seed {self.seed}'

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The evaluation of the test split, with the row's metric; None unless the run is finished.

        It is None too for an evaluation before the last step, or on more or fewer examples than the row asks for now:
        the commands then evaluate again. And it is None if the row was changed since: training then refuses the folder
        and names the difference. It is None in a damaged folder, which `complete` reports.
        """
        try:
            return self.read_evaluation()
        except ValueError:
            return None

    def read_evaluation(self) -> dict[str, Any] | None:
        """Returns `evaluation`.

        Raises:
            ValueError: the evaluation is damaged, or there is one and the config is missing or damaged.
        """
        path = self.workdir / EVALUATION
        try:
            found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
            if not isinstance(found, dict):
                raise ValueError(f'{found!r} is not an object')
        except ValueError as error:
            raise ValueError(f'{path} is damaged ({error}); delete it, and the same command evaluates again') from None
        if self.row.metric not in found:
            return None
        config = _config(self)
        try:
            if found.get('step') != config.steps or saved_config.differences(self.workdir, config):
                return None
            # Evaluations of earlier versions do not say their limit.
            limit = found['limit'] if 'limit' in found else saved_config.load(self.workdir).run.test_examples
        except ValueError as error:
            raise ValueError(f'{error}; or delete {self.workdir}, and the same command runs it again') from None
        return found if limit == config.run.test_examples else None

    @property
    def pretraining(self) -> Path | None:
        """The workdir of the run that gives the backbone; None for a row without pretraining."""
        return self.workdir / 'pretraining' if self.row.pretrain else None

    def config_arguments(self) -> list[str]:
        """Returns the arguments for the config, on the command line that trains."""
        if self.pretraining is None:
            return self._arguments()
        # The backbone of a model without classes has no class token.
        return [*self._arguments(), f'--config.init_from={self.pretraining}', '--config.model.pool=mean']

    def _arguments(self, *more: str) -> list[str]:
        argument = ','.join(filter(None, (self.row.argument, *more, f'scale={self.scale}')))
        found = ['--config', f'{self.row.config}:{argument}', f'--config.seed={self.seed}']
        found += [f'--config.{setting}' for setting in self.row.settings]
        return found if self.data_dir is None else [*found, f'--config.data.data_dir={self.data_dir}']

    def config(self) -> Any:
        """Returns the config that `config_arguments` give."""
        return parse_config(self.config_arguments())

    def commands(self) -> dict[str, list[str]]:
        """Returns the command lines that pretrain (if the row asks for it), train and evaluate, in this order."""
        workdir = ['--workdir', str(self.workdir)]
        train = [sys.executable, '-m', 'combiner.train']
        before = [*train, *self._arguments(f'pretrain={self.row.pretrain}'), '--workdir', str(self.pretraining)]
        return {
            **({'pretrain': before} if self.row.pretrain else {}),
            'train': [*train, *self.config_arguments(), *workdir],
            'evaluate': [sys.executable, '-m', 'combiner.evaluate', *workdir],
        }


def parse_config(arguments: list[str]) -> Any:
    """Returns the config that these command-line arguments give."""
    values = flags.FlagValues()
    line = ['', *arguments]
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=line)
    values(line)
    return config.value


def full_size(row: Row) -> Any:
    """Returns a row's config at full size."""
    return Run(row, 'full', 0, Path()).config()


@functools.cache
def _config(run: Run) -> Any:
    """Returns a run's config, which takes some 10 ms to make."""
    return run.config()


class Ended(NamedTuple):
    """The end of a command: exit status (minus the signal that killed it), wall-clock seconds, peak memory in MB.

    On Linux the peak is at least the memory of the process that started the command. Training imports all that this
    process does, and so needs more.
    """

    status: int
    seconds: float
    peak_memory_mb: float


Execute = Callable[[list[str], BinaryIO], Ended]


class Processes:
    """Executes commands one after the other, each as a process in a group of its own.

    As a context, it forwards every Ctrl-C and SIGTERM to the running command, which is in another process group than
    the terminal's foreground and would not get them; SIGHUP, of a lost terminal, as SIGTERM unless it is ignored, as
    after `nohup`. Outside of the context, an interrupt of the wait ends the command.

    Attributes:
        received: number of the first signal that was forwarded, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._pending = 0  # a signal that arrived while no command ran
        self._process: subprocess.Popen | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> 'Processes':
        forwarded = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            forwarded.append(signal.SIGHUP)
        self._handlers = {each: signal.signal(each, self._forward) for each in forwarded}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def __call__(self, command: list[str], log: BinaryIO) -> Ended:
        """Executes a command; its output goes into `log`."""
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            if self._pending:
                self._process.send_signal(self._pending)
            _, status, usage = os.wait4(self._process.pid, 0)
        except BaseException:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            raise
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return Ended(self._process.returncode, time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6)

    def _forward(self, number: int, _: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.received = self.received or number
        if self._process is None or self._process.returncode is not None:
            self._pending = number
        else:
            self._process.send_signal(number)


def complete(run: Run, execute: Execute, process: int = 0) -> str | None:
    """Trains and evaluates a run unless it is finished or damaged; returns None, or the error in one line.

    The log is locked while a command writes to it, even if this process is killed meanwhile, so that two commands never
    train into the same folder. If several processes complete one run together, each has its number and its own log, and
    the first one records the commands.
    """
    try:
        if run.read_evaluation():
            return None
    except ValueError as error:
        return str(error)
    run.workdir.mkdir(parents=True, exist_ok=True)
    with (run.workdir / (f'log_{process}.txt' if process else 'log.txt')).open('ab') as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f'another process is training this run: see {log.name}, and try again when it has ended'
        except OSError:
            pass  # a file system without locks
        for name, command in run.commands().items():
            before = _metrics(run, name)
            start = log.seek(0, os.SEEK_END)
            log.write(f'$ {shlex.join(command)}\n'.encode())
            log.flush()
            ended = execute(command, log)
            # A training that was finished already does nothing, maybe on another machine: it is not recorded.
            if process == 0 and (ended.status or name == 'evaluate' or _metrics(run, name) != before):
                _record(run, name, ended)
            if ended.status:
                output = Path(log.name).read_bytes()[start:].decode(errors='replace')
                return f'{name} {_describe(ended.status)}: {_last_line(output)}'
    return None if process or run.evaluation else f'evaluate wrote no {run.row.metric} to {run.workdir / EVALUATION}'


def _metrics(run: Run, name: str) -> str:
    """Returns the metrics that the command with this name adds to, if it trains; as text, in which NaN equals NaN."""
    workdir = run.pretraining if name == 'pretrain' else run.workdir
    return json.dumps(lines_of((workdir or run.workdir) / 'metrics.jsonl'))


def _last_line(output: str) -> str:
    """Returns the last line of a command's output that is not about what to do next."""
    return [line for line in output.strip().splitlines() if not line.startswith('next: ')][-1]


def _describe(status: int) -> str:
    return f'was killed by {signal.Signals(-status).name}' if status < 0 else f'failed with exit status {status}'


def _record(run: Run, name: str, ended: Ended) -> None:
    line = {'command': name, **ended._asdict(), **environment()}
    with (run.workdir / 'commands.jsonl').open('a', encoding='utf-8') as file:
        file.write(json.dumps(line) + '\n')


def environment() -> dict[str, Any]:
    """Returns device, machine, versions and commit; only the commit if the device cannot be asked.

    The commit is that of now: in the weeks of a table, the code may change between two runs.
    """
    return {**_device(), 'commit': provenance.commit()}


@functools.cache
def _device() -> dict[str, Any]:
    """Returns device, machine and versions; nothing if the device cannot be asked.

    A separate process asks for the device, because a process that has asked keeps the device until it ends.
    """
    code = 'import json; from experiments.harness import timing; print(json.dumps(timing.environment()))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, encoding='utf-8', check=False)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file, if it exists, without those that a kill cut short."""
    found = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def diverged(run: Run) -> bool:
    """Returns whether the last command of a run ended because a loss, a gradient or a parameter was not finite."""
    log = run.workdir / 'log.txt'
    lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines() if log.exists() else []
    return bool(lines) and lines[-1].startswith(_DIVERGED)


def tokens_of_a_step(workdir: Path) -> int:
    """Returns the number of tokens that a training step reads."""
    config = saved_config.load(workdir)
    return config.data.batch_size * math.prod(build.task(config).input_shape)


def seconds_of_steps(workdir: Path) -> list[tuple[int, float]]:
    """Returns (steps, seconds per step) of each logged stretch, without compiling and validation."""
    tokens = tokens_of_a_step(workdir)
    of_steps = ('loss_nats', 'tokens_per_second')
    logged = [line for line in lines_of(workdir / 'metrics.jsonl') if any(name in line for name in of_steps)]
    steps = [line['step'] for line in logged]
    return [
        (step - before, tokens / speed)
        for line, step, before in zip(logged, steps, [0, *steps], strict=False)
        if (speed := line.get('tokens_per_second'))  # none where nothing but compiling lies between two lines
    ]


def train_minutes(workdir: Path) -> float:
    """Returns the minutes of all steps, including those before a run was resumed, without compiling and validation."""
    return sum(steps * seconds for steps, seconds in seconds_of_steps(workdir)) / 60


def _evaluations(evaluation: dict[str, Any], metric: str) -> dict[str, dict[str, float]]:
    found = {name: each[metric] for name, each in evaluation.get('evaluations', {}).items()}
    return {'evaluations': found} if found else {}


def measured(run: Run) -> dict[str, Any] | None:
    """Returns the measurements of a run that tables use; None unless it is finished, no key for one that is missing.

    Returns:
        seed; value (of the row's metric); what `OF_EVALUATION` names; evaluations (the row's metric in each evaluation
        of a task that has several); steps; tokens (read by training); train_minutes (of the steps); seconds_per_step
        (median of the logged stretches); train_peak_memory_mb (resident memory of the process, on the host); and, of
        the last training command, device, machine, cores, commit and versions.
    """
    evaluation = run.evaluation
    if evaluation is None:
        return None
    result = {
        'seed': run.seed,
        'value': evaluation[run.row.metric],
        **{name: evaluation[name] for name in OF_EVALUATION if name in evaluation},
        **_evaluations(evaluation, run.row.metric),
        'steps': evaluation['step'],
        'tokens': evaluation['step'] * tokens_of_a_step(run.workdir),
    }
    if stretches := seconds_of_steps(run.workdir):
        result['train_minutes'] = train_minutes(run.workdir)
        result['seconds_per_step'] = statistics.median(seconds for _, seconds in stretches)
    trained = [line for line in lines_of(run.workdir / 'commands.jsonl') if line['command'] == 'train']
    if trained:
        result['train_peak_memory_mb'] = max(line['peak_memory_mb'] for line in trained)
        result |= {name: trained[-1][name] for name in trained[-1] if name not in ('command', *Ended._fields)}
    return result
