"""The cost of a compiled program on each chip, counted from its text: arithmetic, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, knows nothing of kernels, and is missing on GPUs. Here:

- A loop's body counts as often as it runs. The number is XLA's, or follows from a counter, a constant bound and a
  constant step. A loop of unknown length counts once, and is reported.
- FLOPs are those of matrix products (dot, convolution, cuBLAS, and the estimate that a kernel states), as the published
  peaks are of the matrix units. Products that a compiler moved to the vector unit are not among them.
- A fusion reads its operands and writes its result once; of an operand that is only sliced, the slices, and of a result
  that is updated in place, the update. A kernel or another custom call counts its operands and results.
- Arrays in on-chip memory (VMEM) are not HBM traffic; `accessed_bytes` counts them too.
- An asynchronous operation counts once. Of the branches of a conditional, the one with the most traffic counts.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from combiner.aot.hlo import Array, Computation, Instruction, Module, parse
from combiner.aot.loops import trip_count
from combiner.aot.products import contraction, products

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Names or constants only, or counted elsewhere.
FREE = {
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'add-dependency'),
    *('partition-id', 'replica-id', 'opt-barrier', 'domain'),
}
FREE_TARGETS = {'AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape', 'ConcatBitcast'}
SLICES = ('dynamic-slice', 'slice', 'gather')
KERNELS = ('tpu_custom_call', 'mosaic_gpu', '__gpu$xla.gpu.triton')


class Traffic(NamedTuple):
    """Collectives of one kind, on one chip.

    Attributes:
        count: how many are executed.
        bytes: of the larger of operand and result.
        sent_bytes: that a chip sends if the chips of a group form a ring.
    """

    count: int = 0
    bytes: int = 0
    sent_bytes: int = 0


class Kernel(NamedTuple):
    """A Pallas kernel.

    Attributes:
        name: without a number.
        runs: how often it runs.
        hbm_bytes: of its operands and results, in each run.
        states_flops: whether the program states its FLOPs.
    """

    name: str
    runs: int
    hbm_bytes: int
    states_flops: bool


@dataclasses.dataclass
class Cost:
    """The cost of a program on each chip.

    Attributes:
        flops: of matrix products.
        hbm_bytes: read from and written to the main memory.
        accessed_bytes: the same with on-chip memory.
        cycles: XLA's estimate for its own operations, without kernels; 0 on platforms where it states none.
        collectives: by kind.
        kernels: in the order of the program.
        loops_of_unknown_length: whose bodies are counted once.
    """

    flops: int = 0
    hbm_bytes: int = 0
    accessed_bytes: int = 0
    cycles: int = 0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    loops_of_unknown_length: int = 0

    @property
    def sent_bytes(self) -> int:
        """All bytes that a chip sends."""
        return sum(traffic.sent_bytes for traffic in self.collectives.values())

    def add(self, other: 'Cost', times: int = 1) -> None:
        """Adds a cost that occurs a number of times."""
        self.flops += other.flops * times
        self.hbm_bytes += other.hbm_bytes * times
        self.accessed_bytes += other.accessed_bytes * times
        self.cycles += other.cycles * times
        for kind, traffic in other.collectives.items():
            before = self.collectives.get(kind, Traffic())
            self.collectives[kind] = Traffic(*(a + b * times for a, b in zip(before, traffic, strict=True)))
        self.kernels += [kernel._replace(runs=kernel.runs * times) for kernel in other.kernels]
        self.loops_of_unknown_length += other.loops_of_unknown_length

    def move(self, moved: Iterable[Array]) -> None:
        """Adds arrays that are read or written once."""
        for array in moved:
            self.accessed_bytes += array.bytes
            self.hbm_bytes += array.bytes if array.space == 0 else 0


def count(text: str) -> Cost:
    """Returns the cost of a program, from the text that `compiled.as_text()` returns.

    Raises:
        ValueError: it is no such text.
    """
    module = parse(text)
    return _Counter(module).computation(module.entry)


class _Counter:
    """Counts each computation of a module once, however often it is called."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        """Returns the cost of one execution."""
        if name not in self.known:
            self.known[name] = total = Cost()
            computation = self.module.computations[name]
            for instruction in computation.instructions.values():
                total.add(*self.instruction(computation, instruction))
        return self.known[name]

    def instruction(self, computation: Computation, instruction: Instruction) -> tuple[Cost, int]:
        """Returns the cost of an instruction and how often it occurs."""
        opcode = instruction.opcode
        if opcode == 'while':
            body, condition = (self.computation(instruction.called(each)[0]) for each in ('body', 'condition'))
            total = Cost()
            total.add(body)
            total.add(condition)
            times = trip_count(self.module, computation, instruction)
            total.loops_of_unknown_length += times is None
            return total, 1 if times is None else times
        if opcode == 'conditional':
            names = ('branch_computations', 'true_computation', 'false_computation')
            branches = [self.computation(name) for name in instruction.called(*names)]
            return max(branches, key=lambda branch: (branch.hbm_bytes, branch.flops)), 1
        if opcode == 'call' or (opcode.endswith('-start') and instruction.called('calls')):
            return self.computation(instruction.called('to_apply', 'calls')[0]), 1
        if opcode == 'fusion':
            return self.fusion(computation, instruction), 1
        return self.plain(computation, instruction), 1

    def plain(self, computation: Computation, instruction: Instruction) -> Cost:
        """Returns the cost of an instruction that calls nothing: operands, result, arithmetic, collective."""
        cost = Cost(cycles=_cycles(instruction))
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(('-done', '-update')):
            return cost
        operands = computation.operands(instruction)
        read = [array for operand in operands for array in operand.result]
        written = list(_result(computation, instruction))
        kind = opcode.removesuffix('-start')
        if kind in COLLECTIVES:
            cost.collectives[kind] = self.traffic(kind, instruction, read, written)
        elif opcode == 'custom-call':
            return _custom_call(instruction, read, cost)
        elif opcode in SLICES:
            read = [written[0], *read[1:]]
        elif opcode == 'dynamic-update-slice':
            read, written = read[1:], read[1:2]
        elif opcode == 'scatter':
            read, written = read[1:], [read[-1]]
        else:
            cost.flops = products(computation, instruction)
        cost.move([*read, *written])
        return cost

    def fusion(self, computation: Computation, instruction: Instruction) -> Cost:
        """Returns the cost of a fusion: traffic at its border, arithmetic and collectives inside."""
        inner = self.module.computations[instruction.called('calls')[0]]
        inside = self.computation(inner.name)
        cost = Cost(
            flops=inside.flops,
            cycles=_cycles(instruction),
            collectives=dict(inside.collectives),
            kernels=list(inside.kernels),
        )
        reads = [self.read_bytes(inner, parameter) for parameter in inner.parameters()]
        for operand, size in zip(computation.operands(instruction), reads, strict=True):
            _move(cost, operand.result, size)
        root = inner.instructions[inner.root]
        parts = inner.operands(root) if root.opcode == 'tuple' else [root]
        if len(parts) != len(instruction.result):  # a part is itself a tuple
            cost.move(instruction.result)
            return cost
        for part, array in zip(parts, instruction.result, strict=True):
            _move(cost, (array,), self.written_bytes(inner, part))
        return cost

    def read_bytes(self, computation: Computation, source: Instruction) -> int | None:
        """Returns the bytes that a fused computation reads of a parameter; None for all of it."""
        total = 0
        for user in computation.instructions.values():
            if source.name not in user.operands:
                continue
            only_first = source.name not in user.operands[1:]
            if user.opcode == 'bitcast':
                size = self.read_bytes(computation, user)
            elif user.opcode in SLICES and only_first:
                size = sum(array.bytes for array in user.result)
            elif user.opcode == 'dynamic-update-slice' and only_first:
                size = 0  # updated in place
            elif user.opcode == 'fusion' and user.operands.count(source.name) == 1:
                inner = self.module.computations[user.called('calls')[0]]
                size = self.read_bytes(inner, inner.parameters()[user.operands.index(source.name)])
            else:
                return None
            if size is None:
                return None
            total += size
        return total

    def written_bytes(self, computation: Computation, root: Instruction) -> int | None:
        """Returns the bytes that a fused computation writes of a result; None for all of it."""
        if root.opcode == 'bitcast':
            return self.written_bytes(computation, computation.operands(root)[0])
        if root.opcode == 'fusion' and len(root.result) == 1:
            inner = self.module.computations[root.called('calls')[0]]
            return self.written_bytes(inner, inner.instructions[inner.root])
        if root.opcode != 'dynamic-update-slice':
            return None
        target, update = computation.operands(root)[:2]
        while target.opcode == 'bitcast':
            target = computation.operands(target)[0]
        return sum(array.bytes for array in update.result) if target.opcode == 'parameter' else None

    def traffic(self, kind: str, instruction: Instruction, read: list[Array], written: list[Array]) -> Traffic:
        """Returns the traffic of one collective."""
        size = group_size(instruction, self.module.devices)
        of_operand, of_result = (sum(array.logical_bytes for array in each) for each in (read, written))
        sent = {
            'all-gather': of_result * (size - 1) // size,
            'all-reduce': 2 * of_operand * (size - 1) // size,
            'reduce-scatter': of_operand * (size - 1) // size,
            'all-to-all': of_operand * (size - 1) // size,
            'collective-permute': of_operand,
        }
        return Traffic(1, max(of_operand, of_result), sent[kind])


def _move(cost: Cost, arrays: tuple[Array, ...], size: int | None) -> None:
    """Adds arrays, or at most `size` bytes of them."""
    whole = sum(array.bytes for array in arrays)
    moved = whole if size is None else min(whole, size)
    cost.accessed_bytes += moved
    cost.hbm_bytes += moved if all(array.space == 0 for array in arrays) else 0


def _result(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    """Returns the arrays that an instruction writes; those of an asynchronous one are the result of its end."""
    if not instruction.opcode.endswith('-start'):
        return instruction.result
    done = instruction.opcode.removesuffix('-start') + '-done'
    for user in computation.instructions.values():
        if user.opcode == done and instruction.name in user.operands:
            return user.result
    return instruction.result


def _custom_call(instruction: Instruction, read: list[Array], cost: Cost) -> Cost:
    target = instruction.attribute('custom_call_target').strip('"')
    if target in FREE_TARGETS:
        return cost
    written = instruction.result[:1] if target.startswith('__cublas') else instruction.result  # not its workspace
    cost.move([*read, *written])
    if target.startswith('__cublas'):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        axes = map(int, re.findall(r'\d+', contracted[1])) if contracted else ()
        cost.flops = contraction(read[0], axes, written[0])
    if target in KERNELS:
        stated = re.search(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)', instruction.attributes)
        cost.flops = int(stated[1]) if stated else 0
        name = re.sub(r'[.\d]+$', '', instruction.name)
        cost.kernels = [Kernel(name, 1, cost.hbm_bytes, stated is not None)]
    return cost


def _cycles(instruction: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else 0


def group_size(instruction: Instruction, devices: int) -> int:
    """Returns the number of chips that take part in a collective together; `devices` if it names no groups."""
    text = instruction.attributes
    if found := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
        return found[1].count(',') + 1
    if found := re.search(r'replica_groups=\[(\d+),(\d+)\]', text):
        return int(found[2])
    if found := re.search(r'replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}', text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return devices
