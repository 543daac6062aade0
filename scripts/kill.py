"""Kills two processes that train together, again and again, and checks that the newest whole checkpoint comes back.

    python scripts/kill.py --workdir DIR [--kills 20] [--seed 0]

Each time it starts a training of two processes on this machine, whose parameters are split between them, waits until
it writes or deletes a checkpoint, and at a random moment kills one of the two, or both, with `kill -9`. The next start
must continue from the newest step that was whole, and must find no damaged one. One line for each kill goes to
DIR/kills.jsonl; the same command continues an interrupted series.
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from combiner import cli, messages, paths

ROOT = Path(__file__).resolve().parents[1]
# A model whose checkpoint of 25 MB takes longer to write than a step to compute.
TRAINING = (
    *('--config', 'configs/photos.py:attention=combiner_fixed,size=16,layers=2,scale=cpu'),
    *(
        '--config.steps=100000',
        '--config.data.batch_size=2',
        '--config.model.width=256',
        '--config.mesh.fsdp=2',
        '--config.optimizer.learning_rate=1e-5',
    ),
    *('--config.run.checkpoint_every=2', '--config.run.eval_every=6', '--config.run.eval_examples=2'),
    *('--config.run.eval_batch_size=2', '--config.run.log_every=1'),
)
SECONDS = 300  # to wait for a training to start, or for a save
GRACE = 120  # seconds after which the other process must have ended


def start(workdir: Path, log: Path) -> list[subprocess.Popen]:
    """Starts two processes with one CPU device each; both write to the log."""
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        port = one.getsockname()[1]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
    environment['JAX_COMPILATION_CACHE_DIR'] = str(workdir.parent / 'compiled')
    command = [sys.executable, '-m', 'combiner.train', *TRAINING, '--workdir', str(workdir), '--processes=2']
    command += [f'--coordinator=127.0.0.1:{port}']
    with log.open('ab') as out:
        return [
            subprocess.Popen(
                [*command, f'--process={i}'], cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
            for i in range(2)
        ]


def end(processes: list[subprocess.Popen], first: list[subprocess.Popen]) -> float:
    """Kills the processes in `first`; returns the seconds until the others have ended by themselves.

    Raises:
        SystemExit: they have not ended after `GRACE` seconds.
    """
    for process in first:
        process.kill()
    began = time.monotonic()
    try:
        for process in processes:
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        cli.fail(f'a process still ran {GRACE} s after the other one was killed; see log.txt', 1)
    return time.monotonic() - began


def steps_of(checkpoints: Path) -> list[int]:
    """Returns the steps that are whole: their folders have their final names."""
    return sorted(int(path.name) for path in checkpoints.glob('*') if path.name.isdigit())


def activity(checkpoints: Path) -> str:
    """Returns 'deletion' or 'save' if one is under way, else ''."""
    if any((checkpoints / 'deleted').glob('*')):
        return 'deletion'
    return 'save' if any(checkpoints.glob('*.orbax-checkpoint-tmp*')) else ''


def wait_for_activity(
    kind: str, processes: list[subprocess.Popen], checkpoints: Path, log: Path, begin: int, idle: float
) -> int:
    """Waits until the training has run for `idle` seconds and is busy with `kind`; returns the step it began with."""
    deadline = time.monotonic() + SECONDS
    started = None
    while True:
        if time.monotonic() > deadline:
            cli.fail(f'no {kind} within {SECONDS} s; see {log}', 1)
        if any(process.poll() is not None for process in processes):
            cli.fail(f'the training ended by itself; see {log}', 1)
        if started is None:
            time.sleep(0.1)
            text = log.read_bytes()[begin:].decode(errors='replace')
            started = re.search(r'\nworkdir: .*, from step ([\d,]+) to .*\n(?:.*\n)*?step \d+/', text)
            time.sleep(idle if started else 0)
        elif activity(checkpoints) == kind:
            return int(started[1].replace(',', ''))


def kill_once(workdir: Path, chance: random.Random) -> dict[str, object]:
    """Starts, kills and returns the record of one kill; `whole` is the newest whole step after it."""
    run, log = workdir / 'run', workdir / 'log.txt'
    checkpoints = run / 'checkpoints'
    log.touch()
    begin = log.stat().st_size
    before = steps_of(checkpoints)
    processes = start(run, log)
    kind, victims = chance.choice(['save', 'deletion']), chance.choice([[0], [1], [0, 1]])
    try:
        continued = wait_for_activity(kind, processes, checkpoints, log, begin, chance.random() * 3)
        time.sleep(chance.random() * 0.1)
        during = activity(checkpoints) or 'nothing'
        seconds = end(processes, [processes[index] for index in victims])
    finally:
        for process in processes:
            process.kill()
    expected = before[-1] if before else 0
    return {
        'waited_for': kind,
        'during': during,
        'killed': victims,
        'seconds_until_all_ended': round(seconds, 1),
        'expected': expected,
        'continued': continued,
        'damaged': sorted(path.name for path in (run / 'corrupt').glob('*')),
        'whole': steps_of(checkpoints)[-1:],
    }


@cli.guarded
def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, required=True, help='folder of the series')
    parser.add_argument('--kills', type=int, default=20, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments (default: %(default)s)')
    options = parser.parse_args()
    messages.heading(device='cpu, two processes', workdir=options.workdir, kills=options.kills)
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / 'kills.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    for number in range(len(lines), options.kills + 1):  # the last one only shows that the one before came back
        line = json.dumps(kill_once(options.workdir.resolve(), random.Random(options.seed * 10_000 + number)))
        lines.append(line)
        with path.open('a', encoding='utf-8') as file:
            file.write(line + '\n')
        print(line, flush=True)
    records = [json.loads(line) for line in lines]
    wrong = [record for record in records if record['continued'] != record['expected'] or record['damaged']]
    kinds = {kind: sum(each['during'] == kind for each in records[:-1]) for kind in ('save', 'deletion', 'nothing')}
    print(
        f'{len(records) - 1} kills ({", ".join(f"{count} during {kind}" for kind, count in kinds.items())}): '
        f'the newest whole step came back {len(records) - 1 - len(wrong)} times; all processes ended within '
        f'{max((each["seconds_until_all_ended"] for each in records[:-1]), default=0)} s'
    )
    messages.next_steps(f'read {path}; the same command with more --kills continues the series')
    raise SystemExit(1 if wrong else 0)


if __name__ == '__main__':
    main()
