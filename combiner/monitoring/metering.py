"""What a run costs: arithmetic, utilisation (MFU), memory of the devices, and the share of time in steps (goodput)."""

import time
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from combiner import startup
from combiner.aot import chips, cost
from combiner.data.task import Task
from combiner.monitoring import flops


class Meter:
    """The figures of a training, for its log.

    Args:
        config: of the run.
        task: of the config.
        mesh: of the devices.
        before: seconds in steps, and seconds in all, of the commands that this one continues.
    """

    def __init__(self, config: Any, task: Task, mesh: Mesh, before: tuple[float, float] = (0.0, 0.0)) -> None:
        self.flops, self.tokens, self.chips = flops.training_step(config, task), flops.tokens(config, task), mesh.size
        self.attention, self.kind = config.model.attention.name, mesh.devices.flat[0].device_kind
        self.peak = chips.peak_of(self.kind)
        self.in_steps, self.in_all = before
        self.began = time.perf_counter() - (startup.seconds() or 0.0)

    def describe(self, program: Any) -> str:
        """Returns what a step costs, as a line: by formula, as compiled, and planned by XLA.

        Args:
            program: the compiled step.
        """
        parts = [f'a step: {self.flops.total / 1e9:,.4g} GFLOP by formula']
        if self.flops.attention is None:
            parts[0] += f' (without {self.attention}, which has none)'
        try:
            compiled = program.as_text()
            counted = cost.count(compiled)
        except Exception as error:  # the text of another compiler; a training does not end for a figure
            logging.warning('the arithmetic of the compiled step could not be counted (%r)', error)
        else:
            least = counted.loops_of_unknown_length or not all(kernel.states_flops for kernel in counted.kernels)
            least = least or '"__cudnn' in compiled  # its calls state no arithmetic
            parts.append(f'{"at least " if least else ""}{counted.flops * self.chips / 1e9:,.4g} as compiled')
        if planned := program.memory_analysis():
            used = planned.argument_size_in_bytes + planned.temp_size_in_bytes
            used += planned.output_size_in_bytes - planned.alias_size_in_bytes
            parts.append(f'{used / 1e9:,.3g} GB planned on each device')
        if self.peak is None:
            parts.append(f'no MFU, as the peak of {self.kind!r} is not known')
        else:
            parts.append(f'MFU is of {self.peak / 1e12:,.4g} TFLOP/s, bfloat16')
        return ', '.join(parts)

    def measure(self, steps: int, tokens_per_second: float) -> dict[str, float]:
        """Returns the figures of the last steps, by name; without steps, only those of the whole run.

        Args:
            steps: their number; 0 if all time since the last line was that of a first step, which compiles.
            tokens_per_second: of all chips, without compiling, validation and saving.
        """
        values = {}
        if steps and tokens_per_second:
            seconds = self.tokens / tokens_per_second
            self.in_steps += steps * seconds
            values['tokens_per_second_per_chip'] = tokens_per_second / self.chips
            values['model_tflops_per_second_per_chip'] = self.flops.total / seconds / self.chips / 1e12
            if self.peak is not None:
                values['mfu'] = flops.utilization(self.flops.total, seconds, self.chips, self.peak)
        if memory := peak_memory():
            values['peak_memory_bytes_per_device'] = float(memory)
        in_all = self.in_all + time.perf_counter() - self.began
        return values | {
            'goodput': self.in_steps / in_all,
            'seconds_in_steps': self.in_steps,
            'seconds_in_all': in_all,
        }


def text(values: dict[str, float]) -> str:
    """Returns the utilisation and the memory as the end of a line, where they are known."""
    found = f', {values["mfu"]:.1%} MFU' if 'mfu' in values else ''
    memory = values.get('peak_memory_bytes_per_device')
    return found + (f', {memory / 1e9:,.1f} GB' if memory else '')


def peak_memory() -> int | None:
    """Returns the most bytes in use so far on one of the devices of this process; None where they do not say (CPUs)."""
    found = [(device.memory_stats() or {}).get('peak_bytes_in_use') for device in jax.local_devices()]
    return max((each for each in found if each is not None), default=None)
