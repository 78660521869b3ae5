"""What stands in for a GPU while a program is traced, and what the compiler is told."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from dataflex_jax import gpu_compiler
from dataflex_jax.aot import compiler
from dataflex_jax.aot.cards import CARDS
from dataflex_jax.errors import InputError
from dataflex_jax.sharding import make_mesh
from tests.helpers.gpu_programs import needs_compiler


def answers():
    return cudnn.check_cudnn_version, cudnn.check_compute_capability, cudnn.is_cuda_compute_capability_equal


def test_a_card_answers_what_jax_asks_of_cudnn():
    before = answers()
    with compiler.standing_in(CARDS["a100"]):
        assert cudnn.check_cudnn_version() == 91000
        assert cudnn.check_compute_capability("8.0")
        assert not cudnn.check_compute_capability("9.0")
        assert cudnn.is_cuda_compute_capability_equal("8.0")
    assert answers() == before


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--device=h100: JAX's CUDA plugin is not installed: pip install .*\[aot\]"):
        compiler.check("--device=h100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert compiler.missing() is None
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        assert compiler.missing() == "JAX_PLATFORMS must be cpu from the start of the process, not None"
    finally:
        jax.config.update("jax_platforms", before)


def test_the_compiler_is_told_what_a_run_tells_it_but_what_the_user_has_said(monkeypatch):
    told = []

    class Function:
        def lower(self, *arguments):
            return self

        def compile(self, compiler_options):
            told.append((jax.config.jax_optimization_level, compiler_options))

    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_all_gather_combine_threshold_bytes=7")
    monkeypatch.delenv("JAX_OPTIMIZATION_LEVEL", raising=False)
    mesh = make_mesh({}, jax.devices()[:1])
    compiler.compiled(Function(), (), mesh, CARDS["h100"], {"xla_gpu_enable_triton_gemm": False})
    compiler.compiled(Function(), (), mesh)
    name = "xla_gpu_reduce_scatter_combine_threshold_bytes"
    value = gpu_compiler.FLAGS[f"--{name}"]
    assert told == [
        (gpu_compiler.LEVEL, {name: value, "xla_gpu_enable_triton_gemm": False}),
        ("UNKNOWN", None),
    ]
    assert jax.config.jax_optimization_level == "UNKNOWN"


@needs_compiler
def test_devices_are_the_cards_and_their_programs_are_compiled():
    devices = CARDS["h100"].devices(16)
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert {(device.device_kind, device.platform) for device in devices} == {("NVIDIA H100 80GB HBM3", "gpu")}
    mesh = make_mesh({"fsdp": 2}, CARDS["a100"].devices(2))
    rows = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
    executable = compiler.compiled(jax.jit(lambda x: x.sum()), (rows,), mesh, CARDS["a100"])
    assert executable.memory_analysis().argument_size_in_bytes == 4 * 4 * 4
    assert "all-reduce" in executable.as_text()
