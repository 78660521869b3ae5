"""Eight virtual CPU devices, set before anything imports jax, and compilations shared between the tests of a
session."""

import gc
import os
from pathlib import Path

# The tests compile thousands of programs and run each for a moment: without LLVM's optimisations, with XLA's older and
# quicker emitters (an extra option that it does not know is ignored), and each in one piece: in 32, to compile them in
# parallel, it takes half as much CPU time again. What XLA_FLAGS says already comes last and wins.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1 "
    + os.environ.get("XLA_FLAGS", "")
).strip()
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# All that JAX keeps of thousands of programs would be searched for garbage again and again.
gc.set_threshold(50_000, 20, 100)
# Now, as the first program of a process finds them, and tests change what the environment says of them.
jax.devices()

_SLOW = Path(__file__).with_name("slow.txt")
_OF_COMMANDS = {Path(__file__).parent, Path(__file__).with_name("runs")}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(config, items):
    """Marks what slow.txt lists; an id of a collected file that is no test's is an error. Commands come first.

    Those are few tests a file, and long ones: last, they would leave one process of pytest-xdist without work.
    """
    items.sort(key=lambda item: item.path.parent not in _OF_COMMANDS)
    listed = {line for line in _SLOW.read_text().splitlines() if not line.startswith("#")}
    names = [{item.nodeid, item.nodeid.split("[")[0]} for item in items]
    for item, of_item in zip(items, names, strict=True):
        if of_item & listed:
            item.add_marker(pytest.mark.slow)
    files = {item.nodeid.split("::")[0] for item in items}
    unknown = {name for name in listed.difference(*names) if name.split("::")[0] in files}
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"{_SLOW}: no test has the id {min(unknown)}")


def pytest_runtest_setup(item):
    """Skips tests of a GPU where there is none, unless they are to show that they would run."""
    dry = os.environ.get("DATAFLEX_GPU_TESTS") == "dry"
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu" and not dry:
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist have a folder each, below one that they share.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    options = {
        "jax_compilation_cache_dir": str(shared / "compilations"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the processes that tests start
