"""Joins the processes of one run, and runs the commands that can be one of several.

    srun python -m combiner.train …                                                   Slurm, Open MPI: nothing to add
    python -m combiner.train … --coordinator=HOST:PORT --processes=2 --process=0      by hand: on each host its number

On the hosts of a TPU pod, in the tasks of a Slurm step or of mpirun, and in the pods of an indexed Kubernetes job,
processes find each other by themselves. `--processes=1` trains alone, for independent runs side by side; not on a host
of a TPU pod, whose TPUs start only together.

A process that fails ends at once, without waiting for the others. The others end when they next need it: with a message
of this module on a CPU; elsewhere JAX ends them, after `HEARTBEAT_SECONDS` at most.
"""

import functools
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags, logging

from combiner import cli, messages
from combiner.run import agreement

# Time after which a process that gives no sign of life counts as dead, and waiting time for all to start.
HEARTBEAT_SECONDS = 100
START_SECONDS = 300

# Statuses of commands that ended in step with the others: success, Ctrl-C, SIGTERM.
_ORDERLY = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
# Words of the errors that JAX's libraries raise when another process is out of reach.
_LOST = ('gloo', 'nccl', 'unavailable', 'deadline_exceeded', 'barrier', 'coordination service', 'connection closed')


class Tasks(NamedTuple):
    """The processes that a launcher started together with this one.

    Attributes:
        launcher: name of the launcher, with the number of its job.
        method: JAX's name of it; '' if JAX cannot find the address of the first process.
        processes: how many.
        process: number of this one.
        local_process: number of this one on its host.
        local_processes: how many are on this host.
    """

    launcher: str
    method: str
    processes: int
    process: int
    local_process: int
    local_processes: int


def tasks() -> Tasks | None:
    """Returns the tasks of the Open MPI run or Slurm step that this process belongs to; None if there are none.

    It counts the tasks of the step, not those of the allocation: a shell in an allocation is one process.
    Open MPI comes first, as it starts its processes from a step of its own in a Slurm job.
    """
    size = {name: int(value) for name, value in os.environ.items() if _COUNT.fullmatch(name) and value.isdigit()}
    if 'OMPI_COMM_WORLD_SIZE' in size:
        count, rank = size['OMPI_COMM_WORLD_SIZE'], size.get('OMPI_COMM_WORLD_RANK', 0)
        local, locals_ = size.get('OMPI_COMM_WORLD_LOCAL_RANK', 0), size.get('OMPI_COMM_WORLD_LOCAL_SIZE', 1)
        method = 'ompi' if 'OMPI_MCA_orte_hnp_uri' in os.environ else ''  # versions before 5
        return Tasks('Open MPI', method, count, rank, local, locals_)
    if 'SLURM_STEP_NUM_TASKS' in size and 'SLURM_PROCID' in size:
        name = f'Slurm step {os.environ.get("SLURM_JOB_ID")}.{os.environ.get("SLURM_STEP_ID")}'
        of_nodes = _counts_of_nodes(os.environ.get('SLURM_STEP_TASKS_PER_NODE', ''))
        node = size.get('SLURM_NODEID', 0)
        locals_ = of_nodes[node] if node < len(of_nodes) else 1
        return Tasks(
            name, 'slurm', size['SLURM_STEP_NUM_TASKS'], size['SLURM_PROCID'], size.get('SLURM_LOCALID', 0), locals_
        )
    return None


_COUNT = re.compile('OMPI_COMM_WORLD_(LOCAL_)?(SIZE|RANK)|SLURM_(STEP_NUM_TASKS|PROCID|LOCALID|NODEID)')


def _counts_of_nodes(text: str) -> list[int]:
    """Returns the tasks of each node, from Slurm's notation, such as '2(x3),1'."""
    found = re.findall(r'(\d+)(?:\(x(\d+)\))?', text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, preemption: bool = True
) -> None:
    """Joins the other processes of the run, if there are any; call it before anything that asks JAX for its devices.

    Args:
        coordinator: HOST:PORT of the first process; by default found by JAX.
        processes: how many; 1 joins none, whatever started this process.
        process: number of this process, from 0.
        preemption: whether SIGTERM to one of them reaches all (see `combiner.train`).

    Raises:
        ValueError: a number is missing or out of range, or the others cannot be found or did not start.
    """
    if processes == 1 and coordinator is None and not process:
        return
    found = tasks()
    if found and found.processes > 1:
        processes = found.processes if processes is None else processes
        process = found.process if process is None else process
        if coordinator is None and not found.method:
            raise ValueError(
                f'{found.launcher} started {found.processes} processes, but this version of it does not say where the '
                'first one runs: give all of them --coordinator=HOST:PORT (its host, any free port), or --processes=1 '
                'for independent runs'
            )
    if (coordinator, processes, process) == (None, None, None):
        if not _detectable():
            return
    elif not (found and found.processes > 1):
        _check(coordinator, processes, process)
    jax.config.update('jax_enable_preemption_service', preemption)
    where = coordinator or (found.launcher if found else 'the address that JAX finds')
    number = 'this process' if process is None else f'process {process}'
    of = '' if processes is None else f' of {processes}'
    logging.info('%s%s joins the others at %s; it waits for them for up to %d s', number, of, where, START_SECONDS)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=_local_devices(found),
            cluster_detection_method=None if coordinator is None else 'deactivate',
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # of the detection, of the network: a dozen types
        raise ValueError(
            f'the processes of this run could not join at {where} ({_first_line(error)}): start the same command on '
            'all hosts; or give --coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to run alone'
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            f'--coordinator={coordinator} --processes={processes} --process={process}: give all three '
            '(process 0 runs on the host of the coordinator), or --processes=1 alone to join none'
        )
    if not re.fullmatch(r'.+:\d+', coordinator):
        raise ValueError(
            f'--coordinator={coordinator} must be HOST:PORT: the host of process 0 and any free port there'
        )
    if not 0 <= process < processes:
        raise ValueError(f'--process={process} does not lie in 0..{processes - 1} (--processes={processes})')


def _detectable() -> bool:
    """Returns whether this is one of several hosts of TPUs, or a pod of an indexed Kubernetes job.

    Other pods, such as those of notebooks, run alone. TPU_ML_PLATFORM is set by JAX where it finds TPUs.
    """
    config: Any = jax.config  # its settings are not in its types
    platforms = config.jax_platforms or ''
    if 'TPU_ML_PLATFORM' in os.environ and (not platforms or 'tpu' in platforms.split(',')):
        hosts = os.environ.get('TPU_PROCESS_ADDRESSES') or os.environ.get('TPU_WORKER_HOSTNAMES')
        slices = os.environ.get('MEGASCALE_NUM_SLICES') or '1'
        return not (hosts and ',' not in hosts and slices == '1')
    if not {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= os.environ.keys():
        return False
    if importlib.util.find_spec('kubernetes'):
        return True
    logging.warning(
        'this pod of an indexed job runs alone: without the package kubernetes JAX cannot find the other pods; install '
        'jax[k8s], or give --coordinator=HOST:PORT --processes=N --process=I, to train together'
    )
    return False


def _local_devices(found: Tasks | None) -> list[int] | None:
    """Returns the numbers of the GPUs that this process takes; [] for all, None to leave it to JAX.

    JAX would give each process of a launcher one GPU: also the only process of a host, and a process that sees only the
    GPU that Slurm has bound to it.
    """
    if 'JAX_LOCAL_DEVICE_IDS' in os.environ or found is None:
        return None
    visible = [name for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name]
    return [] if found.local_processes == 1 or len(visible) == 1 else [found.local_process]


def describe() -> str:
    """Returns one line with the number of processes and devices."""
    devices, count = jax.devices(), jax.process_count()
    local = len(devices) // count
    each = f', {local} in each' if count > 1 else ''
    return (
        f'{count} process{"es" if count > 1 else ""}, {len(devices)} device{"s" if len(devices) > 1 else ""} '
        f'({devices[0].device_kind}){each}'
    )


def not_joined() -> str:
    """Returns how to train one run together, if something started this process with others that it has not joined."""
    found = tasks()
    count = found.processes if found else int(os.environ.get('PMI_SIZE', '1'))
    if jax.process_count() > 1 or count < 2:
        return ''
    launcher = found.launcher if found else 'MPI'
    return (
        f'this process is one of {count} that {launcher} started, and has not joined them: to train one run together, '
        'give all of them --coordinator=HOST:PORT --processes=N --process=I'
        f'{", or leave out --processes=1" if found and found.method else ""}'
    )


def lost(error: BaseException | None) -> bool:
    """Returns whether an error says that another process of this run is out of reach."""
    words = str(error).lower() if isinstance(error, jax.errors.JaxRuntimeError) else ''
    return jax.process_count() > 1 and any(word in words for word in _LOST)


def _check_arguments(arguments: list[str]) -> None:
    """Raises ValueError if the processes were started with different arguments."""
    text = re.sub(r'(^| )--?(process|coordinator)[= ]\S*', '', ' '.join(arguments)).strip()
    if differ := agreement.difference(text):
        later = f' ({differ.later})' if differ.later else ''
        raise ValueError(
            f'the processes of one run need the same arguments; process 0 has {differ.first!r}, process '
            f'{differ.process} has {differ.other!r}{later}; for independent runs, give each --processes=1'
        )


def run(main: Callable[[], None], preemption: bool = False) -> NoReturn:
    """Runs a command as `cli.run`, after it has joined the other processes of the run.

    The first process prints how many processes and devices there are. If this process fails, it ends at once: at an
    orderly end JAX would wait for the others, which wait for this one.

    Args:
        main: of the command.
        preemption: see `join`.
    """
    coordinator = flags.DEFINE_string('coordinator', None, 'HOST:PORT of the first process; by default found by JAX.')
    processes = flags.DEFINE_integer('processes', None, 'How many processes make this run; 1: this one alone.')
    process = flags.DEFINE_integer('process', None, 'Number of this process, from 0.')
    for flag in (coordinator, processes, process):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])

    @functools.wraps(main)
    def joined() -> None:
        arguments = sys.argv[1:]
        join(coordinator.value, processes.value, process.value, preemption)
        _check_arguments(arguments)
        if jax.process_index() == 0:
            messages.heading(device=describe())
        else:
            logging.info('process %d of %d; process 0 prints the progress', jax.process_index(), jax.process_count())
        try:
            main()
        except jax.errors.JaxRuntimeError as error:
            if not lost(error):
                raise
            logging.debug('raised here', exc_info=True)
            cli.fail(
                f'another process of this run has ended or is out of reach ({_first_line(error)}); see its messages; '
                'the same command on all hosts continues from the last checkpoint',
                1,
            )

    try:
        cli.run(joined)
    except BaseException as error:
        status: Any = error.code if isinstance(error, SystemExit) else 1
        if not jax.distributed.is_initialized() or status in _ORDERLY or status is None:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        if isinstance(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status if isinstance(status, int) else 1)
