"""Runs as jobs of a Slurm cluster: one job for each row and seed.

    SBATCH_PARTITION=gpu SBATCH_GPUS=1 SBATCH_TIMELIMIT=1-0 python -m experiments.tables.table1 --launcher slurm

Slurm's own variables set partition, accelerators and time; they override the time that is requested here (24 hours). A
job that runs out of time or is preempted is queued again and resumes from its last checkpoint. The command waits for
all jobs; Ctrl-C cancels them. If the command itself was killed, the same command waits for the jobs that still run.
Jobs keep their files in DIR/TABLE/jobs, and each run's folder has the number of its job (job.txt).

    SBATCH_GPUS_PER_NODE=8 python -m experiments.tables.table3 --launcher slurm --nodes 2

With --nodes, each job has several nodes, with one process on each, which takes all accelerators that Slurm gives it
there. The processes train one run together; each but the first has a log of its own (log_1.txt, …).
"""

import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from combiner import atomic
from experiments.harness import errors
from experiments.harness.run import Processes, Run, complete

MINUTES = 24 * 60
TIMEOUTS = 100  # how often a job may run out of time and resume


class Job:
    """A job that completes a run and returns None, or the error."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self) -> str | None:
        """Completes the run, within each task of the job; the commands join by themselves."""
        return complete(self.run, Processes(), process=_submitit().JobEnvironment().global_rank)

    def checkpoint(self) -> Any:
        """Returns the job that submitit queues in place of this one, when it must end it."""
        return _submitit().helpers.DelayedSubmission(Job(self.run))


def executor(jobs: Path, cluster: str = 'slurm', nodes: int = 1) -> Any:
    """Returns an executor that submits to `cluster`, or with 'local' starts processes; its files lie in `jobs`.

    Each job has one task on each of its nodes.

    Raises:
        ValueError: submitit is not installed, or there is no Slurm.
    """
    try:
        found = _submitit().AutoExecutor(folder=jobs, cluster=cluster, slurm_max_num_timeout=TIMEOUTS)
    except RuntimeError as error:
        raise ValueError(f'the launcher slurm needs Slurm ({error}); use --launcher local') from None
    found.update_parameters(name='combiner', timeout_min=MINUTES, nodes=nodes, tasks_per_node=1)
    return found


def _submitit() -> Any:
    try:
        return importlib.import_module('submitit')
    except ImportError:
        raise ValueError(
            'the launcher slurm needs submitit, which is not installed: pip install "combiner-jax[slurm]", or '
            'pip install submitit; or use --launcher local'
        ) from None


def submit(run: Run, executor: Any) -> Any:
    """Returns the job that completes a run: that of an earlier command if it still runs, else a new one."""
    path = run.workdir / 'job.txt'
    if path.exists():
        kind = {'slurm': 'SlurmJob', 'local': 'LocalJob'}[executor.cluster]
        job = getattr(_submitit(), kind)(executor.folder, path.read_text(encoding='utf-8').strip())
        if not job.done(force_check=True):
            print(f'{run}: waiting for job {job.job_id}, {job.state}; to submit another one, delete {path}', flush=True)
            return job
    job = executor.submit(Job(run))
    print(f'job {job.job_id}: {run}', flush=True)
    run.workdir.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, f'{job.job_id}\n')
    return job


def launch(to_do: Sequence[Run], executor: Any) -> tuple[dict[Run, str], int]:
    """Submits runs and waits for them; returns the errors of failed runs, and SIGINT after Ctrl-C or else 0."""
    submitted: dict[Run, Any] = {}
    failed = {}
    try:
        for run in to_do:
            submitted[run] = submit(run, executor)
        for run, job in submitted.items():
            try:
                error = next(filter(None, job.results()), None)  # of the first task that has one
            except Exception as problem:  # whatever ended the job
                error = f'job {job.job_id} failed: {errors.lines(problem)[-1]}'
            if error:
                failed[run] = error
                print(f'{run}: {error}', file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        for job in submitted.values():
            job.cancel(check=False)  # Slurm no longer knows one that ended long ago
        return failed, signal.SIGINT
    return failed, 0
