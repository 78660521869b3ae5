"""Small programs as XLA writes them, whose figures can be counted by hand."""

# ruff: noqa: E501 - lines of XLA

# A loop of 3 products of float32, each of a slice [8, 4] of x; a fusion with a product of bfloat16; a reduction.
LOOP = """\
HloModule small, is_scheduled=true, entry_computation_layout={(f32[3,8,4]{2,1,0})->f32[8,8]{1,0}}, num_partitions=8

%add (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%a.1, %b.1)
}

%sliced (param_0: f32[3,8,4], param_1: s32[]) -> f32[8,4] {
  %param_0 = f32[3,8,4]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %reshaped = f32[8,4]{1,0} bitcast(%slice)
}

%body (state: (s32[], f32[8,8], f32[3,8,4])) -> (s32[], f32[8,8], f32[3,8,4]) {
  %state = (s32[], f32[8,8]{1,0}, /*index=2*/f32[3,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[3,8,4]{2,1,0} get-tuple-element(%state), index=2
  %row = f32[8,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced
  %square = f32[8,8]{1,0} dot(%row, %row), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/while/dot"}
  ROOT %next = (s32[], f32[8,8]{1,0}, f32[3,8,4]{2,1,0}) tuple(%i, %square, %x)
}

%condition (state.1: (s32[], f32[8,8], f32[3,8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,8]{1,0}, f32[3,8,4]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

%product (p0: bf16[8,8], p1: bf16[8,8]) -> f32[8,8] {
  %p0 = bf16[8,8]{1,0} parameter(0)
  %p1 = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.2 = f32[8,8]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x.1: f32[3,8,4]) -> f32[8,8] {
  %x.1 = f32[3,8,4]{2,1,0} parameter(0)
  %begin = s32[] constant(0)
  %nothing = f32[8,8]{1,0} constant({...})
  %start = (s32[], f32[8,8]{1,0}, f32[3,8,4]{2,1,0}) tuple(%begin, %nothing, %x.1)
  %loop = (s32[], f32[8,8]{1,0}, f32[3,8,4]{2,1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %half = bf16[8,8]{1,0} convert(%last)
  %again = f32[8,8]{1,0} fusion(%half, %half), kind=kCustom, calls=%product, backend_config={"fusion_backend_config":{"kind":"__triton"}}
  %reduced = f32[8,8]{1,0} all-reduce-start(%again), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %done = f32[8,8]{1,0} all-reduce-done(%reduced)
}
"""

# Two gathers of 1,024,000 numbers of bfloat16 over 8 devices; a copy of 40 MB runs while the first is on its way.
GATHERS = """\
HloModule gathers, is_scheduled=true, num_partitions=8

ENTRY %main (w: bf16[1000,128], big: f32[5000000]) -> (bf16[1000,1024], bf16[1000,1024]) {
  %w = bf16[1000,128]{1,0} parameter(0)
  %big = f32[5000000]{0} parameter(1)
  %first = (bf16[1000,128]{1,0}, bf16[1000,1024]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={1}
  %moved = f32[5000000]{0} copy(%big)
  %whole = bf16[1000,1024]{1,0} all-gather-done(%first)
  %second = (bf16[1000,128]{1,0}, bf16[1000,1024]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8], dimensions={1}
  %whole.1 = bf16[1000,1024]{1,0} all-gather-done(%second)
  ROOT %both = (bf16[1000,1024]{1,0}, bf16[1000,1024]{1,0}) tuple(%whole, %whole.1)
}
"""
