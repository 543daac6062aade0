"""Compiles training steps and attentions for accelerators that need not be present, for scripts/compile.py.

Each result is a dictionary of plain values, for JSON. Sizes and counts are those of one chip; a training step is one
update of the whole batch.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax

from combiner import config as common
from combiner.aot import cost, programs, schedule, targets
from combiner.aot.chips import Roofline, roofline
from combiner.core import registry
from combiner.kernels import choice
from combiner.monitoring import flops
from experiments.harness import errors


class Attention(NamedTuple):
    """An attention to compile alone, on the first chip of a target.

    Attributes:
        text: the mechanism, NAME or NAME+hyper=value.
        length: in tokens.
        backward: whether the gradients of q, k and v are computed too.
        target: such as 'v5e'.
        batch, heads, head_width, causal: the shape of the input, in bfloat16.
        packed: whether there are documents, which do not attend to each other.
    """

    text: str
    length: int
    backward: bool
    target: str
    batch: int = 1
    heads: int = 8
    head_width: int = 128
    causal: bool = True
    packed: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of queries, keys and values."""
        return self.batch, self.length, self.heads, self.head_width

    def lower(self) -> Any:
        """Traces it for the target; raises as `targets.Target.devices` and `combiner.attend`."""
        name, hyper = common.mechanism(self.text)
        devices = targets.parse(self.target).devices()
        options = {'causal': self.causal, 'backward': self.backward, 'packed': self.packed}
        return programs.attention(name, hyper, self.shape, devices=devices, **options)

    def needed_flops(self) -> int | None:
        """Returns the arithmetic of its pattern; None for a mechanism without one."""
        name, hyper = common.mechanism(self.text)
        mechanism = registry.make_mechanism(name, hyper, causal=self.causal)
        needed = flops.attention(mechanism, self.length, self.heads * self.head_width)
        passes = flops.TRAINING if self.backward else 1
        return None if needed is None else needed * self.batch * passes


class Settings(NamedTuple):
    """The settings of a config that determine what a training step costs, besides the model and the data."""

    batch_size: int
    accumulation: int
    remat: str


def settings(config: Any) -> Settings:
    """Returns those settings of a config."""
    return Settings(config.data.batch_size, config.optimizer.accumulation, config.model.remat)


def implementations(text: str, platform: str) -> list[str]:
    """Returns a mechanism with each implementation for whole sequences on a platform ('tpu' or 'cuda').

    Each is written as NAME+HYPER=VALUE. A mechanism without a choice, or whose implementation the text names, is
    returned as it is.
    """
    name, hyper = common.mechanism(text)
    offered = getattr(registry.resolve(name), 'implementations', {})
    if not offered or 'implementation' in hyper:
        return [text]
    backend = 'gpu' if platform == 'cuda' else platform
    whole = [each for each in offered if each not in choice.ONLY_ACROSS]
    usable = [each for each in whole if choice.PLATFORMS.get(each) in (None, backend)]
    return [f'{text}+implementation={each}' for each in usable]


def compile_attention(attention: Attention) -> Any:
    """Compiles an attention; a function of a module, which a new process can import."""
    return attention.lower().lower().compile()


def attention(asked: Attention, *, kernels: bool = True) -> dict[str, Any]:
    """Returns the cost of an attention alone, or the reason why it cannot be compiled.

    Args:
        asked: what to compile.
        kernels: whether to compile a program with kernels a second time, to read their schedule (TPU only).
    """
    target = targets.parse(asked.target)
    found: dict[str, Any] = {'name': asked.text, **asked._asdict()}
    del found['text']
    try:
        traced = asked.lower()
    except (NotImplementedError, ValueError) as error:  # the mechanism has no such form for this shape
        return found | {'fits': False, 'refused': errors.lines(error)[0]}
    try:
        program = programs.compiled(traced.lower(), target.chip.platform)
    except jax.errors.JaxRuntimeError as error:
        if not (refused := programs.refusal(str(error))):
            raise
        return found | {'fits': False, **refused}
    counted = cost.count(program.text)
    needed = asked.needed_flops()
    least = programs.least_bytes(asked.shape, backward=asked.backward)
    times = roofline(target.chip, flops=max(counted.flops, needed or 0), hbm_bytes=counted.hbm_bytes)
    found |= {
        'fits': True,
        **programs.memory(program.executable),
        **counts(counted),
        'needed_flops': needed,
        'least_bytes': least,
        'times_least': round(counted.hbm_bytes / least, 3),
        'roofline': times_of(times),
        'kernels': sorted({kernel.name for kernel in counted.kernels}),
    }
    known = kernels or not counted.kernels
    found['schedule_seconds'] = scheduled_seconds(asked, traced, counted, target) if known else None
    return found


def module(asked: Attention, *, rotary: bool) -> dict[str, Any]:
    """Returns the traffic of the memory by the module around an attention, with its projections and all gradients.

    `arrays` is the traffic in units of the input, which is as large as the queries.

    Raises:
        ValueError: the mechanism has no such form.
        jax.errors.JaxRuntimeError: the compiler refuses it.
    """
    target, (name, hyper) = targets.parse(asked.target), common.mechanism(asked.text)
    options = {'causal': asked.causal, 'rotary': rotary, 'devices': target.devices()}
    program = programs.compiled(programs.module(name, hyper, asked.shape, **options), target.chip.platform)
    moved = cost.count(program.text).hbm_bytes
    arrays = moved / programs.least_bytes(asked.shape, backward=False) * 4
    return {'name': asked.text, 'length': asked.length, 'rotary': rotary, 'hbm_bytes': moved, 'arrays': arrays}


def scheduled_seconds(asked: Attention, traced: Any, counted: cost.Cost, target: targets.Target) -> float | None:
    """Returns the time of the static schedule: XLA's estimate for its operations, bundles × steps of the kernels.

    None if the clock, the estimate or the schedule of a kernel is not known.
    """
    clock = target.chip.cycles_per_second
    if clock is None or counted.loops_of_unknown_length:
        return None
    cycles = counted.cycles
    if counted.kernels:
        steps = schedule.grid_steps(traced.jaxpr.jaxpr)
        bundles = schedule.bundles(compile_attention, asked)
        for kernel in counted.kernels:
            traced_name = schedule.traced_name(kernel.name, steps)
            if traced_name is None or kernel.name not in bundles:
                return None
            cycles += kernel.runs * steps[traced_name] * bundles[kernel.name]
    return cycles / clock or None


def training_step(config: Any, target: targets.Target) -> dict[str, Any]:
    """Returns the cost of a config's training step on each chip of a slice.

    Raises:
        ValueError: the compiler is not installed, there is no such slice, or the batch does not split over it.
        jax.errors.JaxRuntimeError: the compiler refuses the step for another reason than its memory.
    """
    chip = target.chip
    found: dict[str, Any] = {'target': str(target), 'chips': target.chips, 'chip_bytes': chip.hbm_bytes}
    found |= settings(config)._asdict()
    mesh = programs.mesh(config, target)
    began = time.perf_counter()
    try:
        program = programs.compiled(programs.training_step(config, mesh), chip.platform)
    except jax.errors.JaxRuntimeError as error:
        if not (refused := programs.refusal(str(error))):
            raise
        return found | {'fits': False, **refused}
    found['compile_seconds'] = round(time.perf_counter() - began, 1)
    planned = programs.memory(program.executable)
    counted = cost.count(program.text)
    times = roofline(chip, flops=counted.flops, hbm_bytes=counted.hbm_bytes, sent_bytes=counted.sent_bytes)
    found |= {'fits': planned['total_bytes'] <= chip.hbm_bytes, **planned, **counts(counted)}
    return found | {'roofline': times_of(times)}


def counts(counted: cost.Cost) -> dict[str, Any]:
    """Returns the counts of a program as plain values."""
    plain = dataclasses.asdict(counted)
    silent = {kernel.name for kernel in counted.kernels if not kernel.states_flops}
    del plain['kernels']
    collectives = {kind: traffic._asdict() for kind, traffic in sorted(counted.collectives.items())}
    return plain | {'collectives': collectives, 'kernels_without_flops': sorted(silent)}


def times_of(times: Roofline) -> dict[str, Any]:
    """Returns a roofline as plain values."""
    seconds = {f'{name}_seconds': value for name, value in times._asdict().items()}
    return {**seconds, 'seconds': times.seconds, 'bound': times.bound}


def _size(number: float, unit: str, base: int = 1000) -> str:
    """Returns a number with the prefix that leaves one to four digits before the point."""
    prefixes = ('', 'K', 'M', 'G', 'T', 'P', 'E')
    index = 0
    while number >= base and index < len(prefixes) - 1:
        number, index = number / base, index + 1
    infix = 'i' if base == 1024 and index else ''
    return f'{number:.{0 if index == 0 else 2}f} {prefixes[index]}{infix}{unit}'


flops_text = functools.partial(_size, unit='FLOP')
bytes_text = functools.partial(_size, unit='B')
memory_text = functools.partial(_size, unit='B', base=1024)


def describe_step(name: str, found: dict[str, Any]) -> str:
    """Returns the cost of a training step as text for a terminal."""
    chip = targets.parse(found['target']).chip
    lines = [f'{name} for {found["target"]}, {found["chips"]} chip(s): compiled for it, not run on it', '']
    verdict = 'fits' if found['fits'] else 'DOES NOT FIT'
    if 'total_bytes' not in found:
        lines.append(
            f'memory        {verdict}: the compiler needs {memory_text(found["temporaries_bytes"])} of temporaries '
            f'on each chip, which has {memory_text(found["chip_bytes"])}; take more or larger chips, '
            '--config.optimizer.accumulation=N, or --config.model.remat=full'
        )
        return '\n'.join(lines)
    sizes = {part: memory_text(found[f'{part}_bytes']) for part in ('arguments', 'temporaries', 'total')}
    lines.append(
        f'memory        arguments {sizes["arguments"]}, temporaries {sizes["temporaries"]}, in all {sizes["total"]} '
        f'of {memory_text(found["chip_bytes"])}: {verdict}'
    )
    times, rates = found['roofline'], (chip.flops_per_second, chip.hbm_bytes_per_second)
    lines.append(_resource('arithmetic', flops_text(found['flops']), times['compute_seconds'], flops_text(rates[0])))
    lines.append(_resource('HBM', bytes_text(found['hbm_bytes']), times['hbm_seconds'], bytes_text(rates[1])))
    sent = sum(traffic['sent_bytes'] for traffic in found['collectives'].values())
    speed = bytes_text(chip.interconnect_bytes_per_second)
    lines.append(_resource('interconnect', f'{bytes_text(sent)} sent', times['interconnect_seconds'], speed))
    for kind, traffic in found['collectives'].items():
        of_kind = f'{traffic["count"]:,.0f}, {bytes_text(traffic["bytes"])}, {bytes_text(traffic["sent_bytes"])} sent'
        lines.append(f'  {kind:<20}{of_kind}')
    lines.append(f'roofline      {1e3 * times["seconds"]:.2f} ms a step at least; {times["bound"]} binds')
    lines += [f'note          {note}' for note in notes(found)]
    return '\n'.join(lines)


def _resource(name: str, amount: str, seconds: float, rate: str) -> str:
    return f'{name:<14}{amount}: {1e3 * seconds:.2f} ms at {rate}/s'


def notes(found: dict[str, Any]) -> list[str]:
    """Returns what the counts of a program leave out."""
    left_out = []
    if found['loops_of_unknown_length']:
        left_out.append(f'{found["loops_of_unknown_length"]} loop(s) of unknown length are counted once')
    if found['kernels_without_flops']:
        left_out.append(f'without the arithmetic of the kernels {", ".join(found["kernels_without_flops"])}')
    if targets.parse(found['target']).chip.platform == 'cuda':
        left_out.append('GPU kernels are compiled without autotuning; memory is compared with the size of the card')
    return left_out


def why_not(found: dict[str, Any]) -> str:
    """Returns why an attention does not compile."""
    return found.get('refused') or f'needs {memory_text(found["temporaries_bytes"])}'


ATTENTION_LINE = '{:<46}{:>8} {:>4}  {:>10} {:>7}  {:>12} {:<13}{:>12}'
ATTENTION_HEAD = ATTENTION_LINE.format(
    'attention', 'length', 'pass', 'HBM', '× least', 'roofline, µs', 'bound', 'schedule, µs'
)


MODULE_LINE = '{:<46}{:>8} {:>10}{:>12}{:>9}'
MODULE_HEAD = MODULE_LINE.format('module, forward and backward', 'length', 'positions', 'HBM', 'arrays')


def describe_module(found: dict[str, Any]) -> str:
    """Returns the traffic of a module as a line of a table for a terminal."""
    positions, arrays = 'rotary' if found['rotary'] else 'none', f'{found["arrays"]:.1f}'
    return MODULE_LINE.format(found['name'], f'{found["length"]:,}', positions, bytes_text(found['hbm_bytes']), arrays)


def describe_attention(found: dict[str, Any]) -> str:
    """Returns the cost of an attention alone as a line of a table for a terminal."""
    both = 'f+b' if found['backward'] else 'f'
    if not found['fits']:
        return f'{found["name"]:<46}{found["length"]:>8,} {both:>4}  {why_not(found)}'
    times, schedule = found['roofline'], found['schedule_seconds']
    return ATTENTION_LINE.format(
        found['name'],
        f'{found["length"]:,}',
        both,
        bytes_text(found['hbm_bytes']),
        f'{found["times_least"]:.2f}',
        f'{1e6 * times["seconds"]:,.0f}',
        times['bound'],
        '–' if schedule is None else f'{1e6 * schedule:,.0f}',
    )
