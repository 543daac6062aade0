"""How often the loops of a compiled program run."""

import re

from combiner.aot.hlo import Computation, Instruction, Module


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a loop runs; None if it is not known before it runs.

    XLA states it for most loops. Otherwise the loop must have a counter that starts at a constant, grows by one, and is
    compared with a constant.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(found[1])
    condition, body = (module.computations[loop.called(name)[0]] for name in ('condition', 'body'))
    test, operands = _unfused(module, condition, condition.instructions[condition.root])
    direction = test.attribute('direction')
    if test.opcode != 'compare' or direction not in ('LT', 'LE') or operands[0].opcode != 'get-tuple-element':
        return None
    index = int(operands[0].attribute('index'))
    start = _element(computation, computation.operands(loop)[0], index)
    after = _element(body, body.instructions[body.root], index)
    bound, first = _constant(operands[1]), _constant(start)
    if bound is None or first is None or after is None or not _grows_by_one(module, body, after, index):
        return None
    return max(bound + (direction == 'LE') - first, 0)


def _unfused(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Instruction, list[Instruction]]:
    """Returns an instruction and its operands; for a fusion, its last operation and the operands of that."""
    operands = computation.operands(instruction)
    if instruction.opcode != 'fusion':
        return instruction, operands
    fused = module.computations[instruction.called('calls')[0]]
    outside = dict(zip((each.name for each in fused.parameters()), operands, strict=True))
    last = fused.instructions[fused.root]
    return last, [outside.get(each.name, each) for each in fused.operands(last)]


def _element(computation: Computation, source: Instruction, index: int) -> Instruction | None:
    """Returns an element of a tuple, before copies; None if it is not known."""
    if source.opcode != 'tuple':
        return None
    found = computation.operands(source)[index]
    while found.opcode == 'copy':
        found = computation.operands(found)[0]
    return found


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != 'constant' or not re.fullmatch(r'-?\d+', instruction.literal):
        return None
    return int(instruction.literal)


def _grows_by_one(module: Module, body: Computation, after: Instruction, index: int) -> bool:
    """Returns whether a value is the element `index` of the body's argument plus one."""
    addition, operands = _unfused(module, body, after)
    if addition.opcode != 'add':
        return False
    steps = [_constant(each) for each in operands if each.opcode == 'constant']
    counters = [each for each in operands if each.opcode != 'constant']
    while counters and counters[0].opcode == 'copy':
        counters = body.operands(counters[0])
    same = bool(counters) and counters[0].opcode == 'get-tuple-element' and counters[0].attribute('index') == str(index)
    return steps == [1] and same
