import pytest

from dataflex_jax.aot import hlo
from tests.aot.texts import LOOP


def test_instructions_have_types_operands_and_what_they_call():
    module = hlo.parse(LOOP)
    assert module.entry == "main"
    assert list(module.computations) == ["add", "sliced", "body", "condition", "product", "main"]
    body = module.computations["body"]
    assert list(body) == ["state", "i", "x", "row", "square", "next"]
    assert body["state"].arrays == (
        hlo.Array("s32", ()),
        hlo.Array("f32", (8, 8)),
        hlo.Array("f32", (3, 8, 4)),
    )
    assert body["state"].bytes == 4 + 4 * 64 + 4 * 96
    assert (body["row"].opcode, body["row"].operands, body["row"].called("calls")) == ("fusion", ("x", "i"), ["sliced"])
    assert body["square"].numbers("lhs_contracting_dims") == [1]
    assert body["square"].op_name == "jit(f)/while/dot"
    assert body.root.name == "next"
    loop = module.computations["main"]["loop"]
    assert (loop.called("body"), loop.called("condition")) == (["body"], ["condition"])
    assert module.computations["main"]["x.1"].inside == "0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[2,3]{1,0}", 12),
        ("(f32[], s8[7]{0}, pred[2])", 13),
        ("((u64[3]), token[])", 24),
        ("f8e4m3fn[5]", 5),
    ],
)
def test_bytes_of_types(text, expected):
    assert sum(array.bytes for array in hlo.arrays_of(text)) == expected


def test_several_called_computations():
    line = "  ROOT %c = f32[] conditional(%i, %a, %b), branch_computations={%one, %two}"
    module = hlo.parse(f"HloModule m, is_scheduled=true\n\nENTRY %main (a: f32[]) -> f32[] {{\n{line}\n}}\n")
    assert module.computations["main"].root.called("branch_computations") == ["one", "two"]


def test_a_program_that_is_not_compiled_has_no_order():
    with pytest.raises(ValueError, match="is_scheduled"):
        hlo.parse("HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {\n}\n")
