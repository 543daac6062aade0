"""The text of a compiled XLA program (HLO, as `compiled.as_text()` prints it), parsed into computations.

Only what counting a cost needs is read: names, shapes with their layouts, operands, and attributes as text.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r'([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)', re.DOTALL)
_END = re.compile(r'\}(, execution_thread="[^"]*")?$')
_PARENTHESIS = re.compile(r'[()]')
_COMMENT = re.compile(r'/\*.*?\*/')
SIZES = {'pred': 8, 'token': 0, 'opaque': 0}  # in bits, of types without a number in their name


class Array(NamedTuple):
    """The type of an array, with its layout in memory.

    Attributes:
        dtype: XLA's name, such as 'bf16'.
        dims: the sizes of its axes.
        minor_to_major: its axes, the one that is contiguous in memory first.
        tile: sizes to which the last axes in memory are padded; () for none.
        space: of the memory; 0 is the main memory (HBM), others are on the chip (VMEM, SMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def logical_bytes(self) -> int:
        """Its size without padding."""
        return -(-math.prod(self.dims) * bits(self.dtype) // 8)

    @property
    def bytes(self) -> int:
        """Its size in memory: tiles are stored and moved whole."""
        sizes = [self.dims[axis] for axis in self.minor_to_major or reversed(range(len(self.dims)))]
        for index, size in enumerate(reversed(self.tile)):
            if index < len(sizes):
                sizes[index] = -(-sizes[index] // size) * size
        return -(-math.prod(sizes) * bits(self.dtype) // 8)


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: unique within its computation.
        opcode: such as 'fusion' or 'all-reduce-start'.
        result: the arrays of its result; several for a tuple.
        operands: names of instructions.
        literal: the text between the parentheses, which holds the value of a constant.
        attributes: the text after the operands.
    """

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def attribute(self, name: str) -> str:
        """Returns a plain value such as `index=3`, or '' if it has none of this name."""
        found = re.search(rf'\b{name}=([^\s,]+)', self.attributes)
        return found[1] if found else ''

    def numbers(self, name: str) -> tuple[int, ...]:
        """Returns a list of numbers such as `dimensions={0,2}`; () if it has none of this name."""
        found = re.search(rf'\b{name}={{([\d,]*)}}', self.attributes)
        return tuple(map(int, filter(None, found[1].split(',')))) if found else ()

    def called(self, *names: str) -> list[str]:
        """Returns the computations that these attributes name, such as `body=%region_0`."""
        found = []
        for name in names:
            for value in re.findall(rf'\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes):
                found += re.findall(r'[\w.\-]+', value)
        return found


class Computation(NamedTuple):
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results it takes."""
        return [self.instructions[name] for name in instruction.operands]

    def parameters(self) -> list[Instruction]:
        """Returns the parameters in the order of their numbers."""
        found = [each for each in self.instructions.values() if each.opcode == 'parameter']
        return sorted(found, key=lambda each: int(each.literal))


class Module(NamedTuple):
    """A program: its computations by name, the name of the first, and the devices that run it together."""

    computations: dict[str, Computation]
    entry: str
    devices: int


@functools.cache
def bits(dtype: str) -> int:
    """Returns the size of an element: the number in the name of its type.

    Raises:
        ValueError: the type is unknown.
    """
    if dtype in SIZES:
        return SIZES[dtype]
    found = re.match(r'[a-z]+(\d+)', dtype)
    if found is None:
        raise ValueError(f'unknown element type {dtype!r} in the text of a program')
    return int(found[1])


@functools.cache
def arrays(text: str) -> tuple[Array, ...]:
    """Parses a shape such as 'bf16[8,128]{1,0:T(8,128)(2,1)S(1)}', or a tuple of shapes, into its arrays."""
    return tuple(_array(*found.groups('')) for found in _ARRAY.finditer(text))


def _array(dtype: str, dims: str, layout: str) -> Array:
    order, _, rest = layout.partition(':')
    tile = re.search(r'T\(([\d,]+)\)', rest)
    space = re.search(r'S\((\d+)\)', rest)
    return Array(
        dtype,
        tuple(int(size.removeprefix('<=')) for size in dims.split(',') if size),
        tuple(int(axis) for axis in order.split(',') if axis),
        tuple(map(int, tile[1].split(','))) if tile else (),
        int(space[1]) if space else 0,
    )


def parse(text: str) -> Module:
    """Parses a program.

    Raises:
        ValueError: the text has no entry computation, or an instruction of another form.
    """
    header = text.partition('\n')[0]
    computations, entry = {}, ''
    for is_entry, name, lines in _blocks(text):
        computations[name] = _computation(name, lines)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError(f'no ENTRY computation in the text of a program that begins with {header[:60]!r}')
    counts = [int(found) for found in re.findall(r'\b(?:replica_count|num_partitions)=(\d+)', header)]
    return Module(computations, entry, math.prod(counts))


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Yields each computation: whether it is the entry, its name, and its instructions, one string each."""
    lines: list[str] | None = None
    found = None
    for line in text.splitlines():
        if lines is None or found is None:
            if found := _COMPUTATION.match(line):
                lines = []
        elif _END.match(line):
            yield bool(found[1]), found[2], lines
            lines = found = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += '\n' + line  # attributes of kernels may hold line breaks


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ''
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found is None:
            raise ValueError(f'no instruction: {line[:80]!r}')
        instruction = _instruction(found[2], found[3])
        instructions[instruction.name] = instruction
        root = instruction.name if found[1] else root
    return Computation(name, instructions, root)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith('(') else text.index(' ')
    result, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition('(')
    close = _closing(rest, len(opcode))
    literal, attributes = rest[len(opcode) + 1 : close - 1], rest[close:]
    operands = () if opcode in ('constant', 'parameter') else _operands(literal)
    return Instruction(name, opcode, arrays(_COMMENT.sub('', result)), operands, literal, attributes)


def _operands(literal: str) -> tuple[str, ...]:
    """Returns the names of operands, which may have their shapes before them."""
    return tuple(re.findall(r'%([\w.\-]+)', literal))


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found[0] == '(' else -1
        if not depth:
            return found.end()
    raise ValueError(f'unbalanced parentheses: {text[:80]!r}')
