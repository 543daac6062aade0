"""The text of programs: shapes with layouts, instructions over several lines, computations."""

import pytest

from combiner.aot import hlo

TEXT = """HloModule m, is_scheduled=true, num_partitions=8, replica_count=2

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %neg.1 = f32[4]{0} negate(%p), metadata={op_name="a = b(c"}
}, execution_thread="sparsecore"

ENTRY %main.3 (x: f32[4], y: (s32[], bf16[2,3])) -> (f32[4], bf16[2,3]) {
  %y = (s32[], bf16[2,3]{1,0}) parameter(1)
  %x = f32[4]{0} parameter(0)
  %kernel.2 = f32[4]{0} custom-call(f32[4]{0} %x, /*index=1*/%x), custom_call_target="kernel", metadata={
"blocks": 128
}, backend_config={"n":"3"}
  %fusion = f32[4]{0} fusion(%kernel.2), kind=kLoop, calls=%inner
  %gte = bf16[2,3]{1,0} get-tuple-element(%y), index=1
  ROOT %tuple = (f32[4]{0}, /*index=1*/bf16[2,3]{1,0}) tuple(%fusion, %gte)
}
"""


def test_a_program_is_read():
    module = hlo.parse(TEXT)
    assert (module.entry, module.devices) == ('main.3', 16)
    main = module.computations['main.3']
    assert list(main.instructions) == ['y', 'x', 'kernel.2', 'fusion', 'gte', 'tuple']
    assert main.root == 'tuple'
    assert [each.name for each in main.parameters()] == ['x', 'y']
    kernel = main.instructions['kernel.2']
    assert kernel.operands == ('x', 'x')
    assert kernel.attribute('custom_call_target') == '"kernel"'
    assert '"blocks": 128' in kernel.attributes
    assert '"n":"3"' in kernel.attributes
    assert main.instructions['fusion'].called('calls') == ['inner']
    assert [array.dims for array in main.instructions['tuple'].result] == [(4,), (2, 3)]
    assert main.instructions['gte'].attribute('index') == '1'


@pytest.mark.parametrize(
    ('text', 'size', 'logical', 'space'),
    [
        ('f32[]', 4, 4, 0),
        ('pred[3,5]{1,0}', 15, 15, 0),
        ('bf16[8,64]{1,0:T(8,128)(2,1)}', 8 * 128 * 2, 8 * 64 * 2, 0),
        ('bf16[8,64]{0,1:T(8,128)(2,1)S(1)}', 64 * 128 * 2, 8 * 64 * 2, 1),
        ('s32[100]{0:T(128)}', 128 * 4, 100 * 4, 0),
        ('f8e4m3fn[16]{0}', 16, 16, 0),
        ('s4[16]{0}', 8, 8, 0),
        ('token[]', 0, 0, 0),
        ('f32[<=7,2]{1,0}', 56, 56, 0),
    ],
)
def test_arrays_have_their_size_in_memory(text, size, logical, space):
    (array,) = hlo.arrays(text)
    assert (array.bytes, array.logical_bytes, array.space) == (size, logical, space)


def test_a_tuple_has_its_arrays_in_order():
    nested = '((f32[2]{0}, s8[3]{0:T(128)}), u32[]{:S(2)})'
    assert [(array.dtype, array.dims, array.space) for array in hlo.arrays(nested)] == [
        ('f32', (2,), 0),
        ('s8', (3,), 0),
        ('u32', (), 2),
    ]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        hlo.parse('module {\n}\n')
    with pytest.raises(ValueError, match="unknown element type 'nothing'"):
        hlo.bits('nothing')
