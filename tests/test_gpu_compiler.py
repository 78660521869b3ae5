"""What XLA's GPU compiler is told, and where it is told nothing."""

import importlib.metadata
import logging
import os
import subprocess
import sys

import jax
import pytest

from dataflex_jax import gpu_compiler

PLUGIN = importlib.metadata.EntryPoint("xla_cuda13", "jax_plugins.xla_cuda13", "jax_plugins")
OURS = " ".join(f"{name}={value}" for name, value in gpu_compiler.FLAGS.items())


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """One with a GPU and JAX's plugin for it, on which nothing is set; changed by what is passed."""

    def make(plugin=True, device=True, platforms=None, level=None, flags=None):
        of_group = {"jax_plugins": [PLUGIN] if plugin else []}
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: of_group[group])
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(gpu_compiler, "_DEVICES", (str(tmp_path / ("nvidia0" if device else "none")),))
        for name, value in (("JAX_OPTIMIZATION_LEVEL", level), ("XLA_FLAGS", flags)):
            monkeypatch.setenv(name, "")  # so that it is as before afterwards
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        jax.config.update("jax_platforms", platforms)

    before = jax.config.jax_platforms
    make()
    yield make
    jax.config.update("jax_platforms", before)
    jax.config.update("jax_optimization_level", "UNKNOWN")


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dataflex_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "dataflex_jax")
    return caplog


@pytest.mark.parametrize("platforms", [None, "cuda", "gpu,cpu"])
def test_a_machine_with_a_gpu_has_the_defaults_and_says_so_in_one_line(machine, said, platforms):
    machine(platforms=platforms)
    gpu_compiler.tell()
    assert jax.config.jax_optimization_level == os.environ["JAX_OPTIMIZATION_LEVEL"] == "O1"
    assert os.environ["XLA_FLAGS"] == OURS
    assert len(said.messages) == 1
    assert said.messages[0].endswith(f"JAX_OPTIMIZATION_LEVEL=O1, XLA_FLAGS={OURS}")


@pytest.mark.parametrize("without", [{"plugin": False}, {"device": False}, {"platforms": "cpu"}])
def test_elsewhere_nothing_is_set(machine, said, without):
    machine(**without)
    gpu_compiler.tell()
    assert jax.config.jax_optimization_level == "UNKNOWN"
    assert {"JAX_OPTIMIZATION_LEVEL", "XLA_FLAGS"}.isdisjoint(os.environ)
    assert said.messages == []


def test_what_the_user_has_set_stays(machine, said):
    gather, scatter = gpu_compiler.FLAGS
    machine(level="O0", flags=f"--xla_dump_to=/x {gather}=5")
    gpu_compiler.tell()
    assert os.environ["JAX_OPTIMIZATION_LEVEL"] == "O0"
    added = f"{scatter}={gpu_compiler.FLAGS[scatter]}"
    assert os.environ["XLA_FLAGS"] == f"{added} --xla_dump_to=/x {gather}=5"
    assert said.messages[0].endswith(f"set already: XLA_FLAGS={added}")

    machine(flags="a_file_of_flags")
    jax.config.update("jax_optimization_level", "O2")
    gpu_compiler.tell()
    assert jax.config.jax_optimization_level == "O2"
    assert "JAX_OPTIMIZATION_LEVEL" not in os.environ
    assert os.environ["XLA_FLAGS"] == "a_file_of_flags"
    assert len(said.messages) == 1


def test_xla_knows_the_flags():
    """An unknown one would end the process."""
    code = "import jax; print(jax.numpy.ones(2).sum())"
    environment = os.environ | {"XLA_FLAGS": OURS, "JAX_OPTIMIZATION_LEVEL": gpu_compiler.LEVEL, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "2.0\n", done.stderr


def test_layers_that_are_written_out_have_options_of_their_own_but_the_users_stay(machine):
    ours = {name.removeprefix("--"): value for name, value in gpu_compiler.WRITTEN_OUT.items()}
    gather = "xla_gpu_all_gather_combine_threshold_bytes"
    gpu_compiler.tell()
    assert gpu_compiler.options(scan_layers=True) == {}
    assert gpu_compiler.options(scan_layers=False) == ours
    machine(flags=f"--{gather}=5")
    gpu_compiler.tell()
    assert gpu_compiler.options(scan_layers=False) == {name: value for name, value in ours.items() if name != gather}
    machine(flags="a_file_of_flags")
    assert gpu_compiler.options(scan_layers=False) == {}
