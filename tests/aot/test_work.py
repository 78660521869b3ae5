"""FLOPs and bytes of single instructions, counted by hand."""

# ruff: noqa: E501 - lines of XLA

import pytest

from dataflex_jax.aot import hlo, work

FORWARD = (
    '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "16", "16"]}, "is_flash_attention": '
    'true, "mask_type": "%s", "sliding_window_length": %d'
)


def module_of(lines: str, inner: str = "") -> tuple[hlo.Module, hlo.Computation]:
    text = f"HloModule m, is_scheduled=true\n\n{inner}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"
    module = hlo.parse(text)
    return module, module.computations["main"]


def found(lines: str, inner: str = "") -> tuple[dict[str, float], int]:
    """(FLOPs, bytes) of the last instruction."""
    module, main = module_of(lines, inner)
    return dict(work.flops(module, main, main.root)), work.hbm_bytes(module, main, main.root)


def test_a_product_over_batches():
    lines = """\
  %x = bf16[2,8,4]{2,1,0} parameter(0)
  %y = bf16[2,4,16]{2,1,0} parameter(1)
  ROOT %d = f32[2,8,16]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"""
    assert found(lines) == ({"bf16": 2 * (2 * 8 * 16) * 4}, 2 * 64 + 2 * 128 + 4 * 256)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("", "tf32"), (", operand_precision={high,high}", "tf32"), (", operand_precision={highest,highest}", "f32")],
)
def test_float32_is_multiplied_in_fewer_digits_unless_it_is_asked_for(precision, dtype):
    lines = f"""\
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %d = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}{precision}"""
    assert found(lines)[0] == {dtype: 2 * 8 * 8 * 4}


@pytest.mark.parametrize(
    ("mask", "window", "seen"),
    [("NO_MASK", 0, 16 * 16), ("CAUSAL", 0, 136), ("PADDING_CAUSAL", 0, 136), ("CAUSAL", 4, 58)],
)
def test_cudnns_attention_counts_what_a_query_sees(mask, window, seen):
    lines = f"""\
  %q = bf16[2,16,4,8]{{3,2,1,0}} parameter(0)
  %k = bf16[2,16,2,8]{{3,2,1,0}} parameter(1)
  ROOT %a = (bf16[2,4,16,8]{{3,1,2,0}}, f32[2,4,16]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={{{FORWARD % (mask, window)}}}"""
    flops, moved = found(lines)
    # Scores and values: 2 products of 2 FLOPs each for every head of every row.
    assert flops == {"bf16": 2 * 2 * (2 * 4) * seen * 8}
    assert moved == 2 * (1024 + 2 * 512) + 2 * 1024 + 4 * 128
    backward = lines.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert found(backward)[0] == {"bf16": 5 * 2 * (2 * 4) * seen * 8}


def test_a_library_product():
    lines = """\
  %x = bf16[8,4]{1,0} parameter(0)
  %y = bf16[4,16]{1,0} parameter(1)
  ROOT %d = (bf16[8,16]{1,0}, s8[100]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""
    assert found(lines)[0] == {"bf16": 2 * 8 * 16 * 4}


UPDATE = """\
%updated (p0: f32[10,8], p1: f32[8], p2: s32[]) -> f32[10,8] {
  %p0 = f32[10,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %new = f32[1,8]{1,0} bitcast(%p1)
  ROOT %u = f32[10,8]{1,0} dynamic-update-slice(%p0, %new, %p2, %zero)
}
"""
SCATTER = """\
%scattered (p0: f32[10,8], p1: s32[2], p2: f32[2,8]) -> f32[10,8] {
  %p0 = f32[10,8]{1,0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  %p2 = f32[2,8]{1,0} parameter(2)
  ROOT %s = f32[10,8]{1,0} scatter(%p0, %p1, %p2), to_apply=%add
}
"""
GATHER = """\
%gathered (p0: f32[10,8], p1: s32[2]) -> f32[2,8] {
  %p0 = f32[10,8]{1,0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  %seen = f32[10,8]{1,0} bitcast(%p0)
  ROOT %g = f32[2,8]{1,0} gather(%seen, %p1), offset_dims={1}
}
"""
TWICE = """\
%twice (p0: f32[10,8], p1: s32[]) -> f32[10,8] {
  %p0 = f32[10,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %s = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %p1)
  %b = f32[10,8]{1,0} broadcast(%s), dimensions={0,1}
  ROOT %a = f32[10,8]{1,0} add(%p0, %b)
}
"""


@pytest.mark.parametrize(
    ("inner", "operands", "result", "expected"),
    [
        # The update is read and written, not the ten rows; the index is read.
        (UPDATE, ("f32[10,8]", "f32[8]", "s32[]"), "f32[10,8]", 32 + 4 + 32),
        # Two rows are read, written and added.
        (SCATTER, ("f32[10,8]", "s32[2]", "f32[2,8]"), "f32[10,8]", 64 + 8 + 64 + 64),
        (GATHER, ("f32[10,8]", "s32[2]"), "f32[2,8]", 64 + 8 + 64),
        # What is also used whole is read whole.
        (TWICE, ("f32[10,8]", "s32[]"), "f32[10,8]", 320 + 4 + 320),
    ],
    ids=["update", "scatter", "gather", "whole"],
)
def test_a_fusion_moves_what_it_reads_and_changes(inner, operands, result, expected):
    name = inner[1 : inner.index(" ")]
    lines = [f"  %o{place} = {kind} parameter({place})" for place, kind in enumerate(operands)]
    given = ", ".join(f"%o{place}" for place in range(len(operands)))
    lines.append(f"  ROOT %f = {result} fusion({given}), kind=kLoop, calls=%{name}")
    assert found("\n".join(lines), inner) == ({}, expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  ROOT %r = f32[1,8]{1,0} dynamic-slice(%x, %i, %i)", 64),
        ("  ROOT %r = f32[10,8]{1,0} dynamic-update-slice(%x, %row, %i, %i)", 64),
        ("  ROOT %r = (f32[10,8]{1,0}, f32[10,8]{1,0}, u32[]) copy-start(%x)", 640),
        ("  ROOT %r = f32[8,10]{0,1} transpose(%x), dimensions={1,0}", 640),
    ],
)
def test_other_instructions(line, expected):
    lines = f"""\
  %x = f32[10,8]{{1,0}} parameter(0)
  %row = f32[1,8]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
{line}"""
    assert found(lines) == ({}, expected)


@pytest.mark.parametrize(
    ("operands", "result"),
    [
        # Blocks [6, 16, 32] of 4 experts, half of whose last ones are padding; with weights, or with blocks of outputs.
        ("s32[6]{0} s32[1]{0} bf16[6,16,32]{2,1,0} bf16[4,32,64]{2,1,0}", "bf16[6,16,64]{2,1,0}"),
        ("s32[4]{0} s32[4]{0} bf16[6,16,32]{2,1,0} bf16[6,16,64]{2,1,0}", "bf16[4,32,64]{2,1,0}"),
    ],
)
def test_experts_products_count_the_blocks_that_are_used_on_average(operands, result):
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands.split())]
    call = (
        'custom-call(%p0, %p1, %p2, %p3), custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI'
    )
    lines.append(f"  ROOT %c = {result} {call}")
    assert found("\n".join(lines))[0] == {"bf16": 2 * (6 - 2) * 16 * 32 * 64}
