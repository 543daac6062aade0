"""The arithmetic of matrix products and convolutions in a compiled program."""

import math
import re
from collections.abc import Iterable

import numpy as np

from combiner.aot.hlo import Array, Computation, Instruction


def products(computation: Computation, instruction: Instruction) -> int:
    """Returns the FLOPs of a matrix product or a convolution; 0 of anything else."""
    if instruction.opcode == 'dot':
        left = computation.operands(instruction)[0].result[0]
        return contraction(left, instruction.numbers('lhs_contracting_dims'), instruction.result[0])
    if instruction.opcode == 'convolution':
        left, right = (operand.result[0].dims for operand in computation.operands(instruction))
        return _convolution(instruction, left, right)
    return 0


def contraction(left: Array, axes: Iterable[int], result: Array) -> int:
    """Returns the FLOPs of a product that sums over these axes of its left operand."""
    return 2 * math.prod(result.dims) * math.prod(left.dims[axis] for axis in axes)


def _convolution(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Returns the FLOPs of a convolution: TPUs compute matrix products as convolutions.

    A batch axis then is a spatial axis whose kernel meets padding and holes except once, so only the positions of the
    kernel that meet an element count.
    """
    labels = instruction.attribute('dim_labels')
    inputs, kernel, output = re.fullmatch(r'(\w+)_(\w+)->(\w+)', labels).groups()  # pyright: ignore
    window = re.search(r'window=\{([^}]*)\}', instruction.attributes)
    fields = dict(part.split('=') for part in window[1].split()) if window else {}
    spatial = sorted(letter for letter in inputs if letter.isdigit())
    met = 1
    for index, letter in enumerate(spatial):
        at = {name: int(values.split('x')[index]) for name, values in fields.items() if 'pad' not in name}
        low = int(fields['pad'].split('x')[index].split('_')[0]) if 'pad' in fields else 0
        sizes = left[inputs.index(letter)], instruction.result[0].dims[output.index(letter)]
        met *= _met(*sizes, at.get('size', 1), low, at)
    groups = {name: int(instruction.attribute(f'{name}_group_count') or 1) for name in ('feature', 'batch')}
    batch = left[inputs.index('b')] // groups['batch']
    features = right[kernel.index('i')] * right[kernel.index('o')]
    return 2 * met * batch * features


def _met(inputs: int, outputs: int, kernel: int, low: int, at: dict[str, int]) -> int:
    """Returns the number of pairs of an output and a position of the kernel that meet an element of the input."""
    positions = np.arange(kernel)[::-1] if at.get('rhs_reversal') else np.arange(kernel)
    steps = np.arange(outputs)[:, None] * at.get('stride', 1)
    place = steps - low + positions * at.get('rhs_dilate', 1)
    spacing = at.get('lhs_dilate', 1)
    return int(((place % spacing == 0) & (place >= 0) & (place < inputs * spacing)).sum())
