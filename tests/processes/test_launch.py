"""Which processes make up a run, by the flags or by what SLURM and Open MPI set."""

import logging
import re

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.processes import launch
from dataflex_jax.processes.launch import Launch, check_host, find

STEP = {
    "SLURM_JOB_ID": "123",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "node[001-004,7],other",
    "SLURM_STEP_TASKS_PER_NODE": "1(x8)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def variables(monkeypatch):
    """Sets the environment's variables of SLURM, Open MPI and JAX: these and no others."""

    def having(values: dict[str, str]) -> None:
        for name in list(launch.os.environ):
            if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
                monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    having({})
    return having


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dataflex_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "dataflex_jax")
    return caplog


def test_nothing_says_that_there_are_others(variables, said):
    assert find(None, None, None) is None
    assert said.text == ""


def test_a_step_of_slurm(variables):
    variables(STEP)
    assert find(None, None, None) == Launch("node001", 61440 + 123, 8, 3)
    variables(STEP | {"SLURM_STEP_NODELIST": "a1,b2", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert find(None, None, None) == Launch("a1", 61440 + 123, 8, 3, device=3)


def test_open_mpi(variables):
    variables(MPI)
    assert find(None, None, None) == Launch("10.96.0.1", 61440 + (1531576320 >> 12) % 4096, 2, 1, device=1)
    variables(MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370"})
    assert find(None, None, None).host == "fe80::b9b"
    variables(MPI | {"OMPI_MCA_orte_hnp_uri": "", "JAX_COORDINATOR_ADDRESS": "there:77"})
    assert find(None, None, None) == Launch("there", 77, 2, 1, device=1)


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({"SLURM_JOB_ID": "123", "SLURM_NTASKS": "8"}, "SLURM_NTASKS=8, .* srun: it runs alone"),
        (
            STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "SLURM_NTASKS=8, .* srun: it runs alone",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2, .* mpirun: it runs alone"),
    ],
    ids=("the shell of an allocation", "an interactive step", "Open MPI without a rank"),
)
def test_an_allocation_without_a_step_of_it_runs_alone_and_says_so(variables, said, environment, how):
    variables(environment)
    assert find(None, None, None) is None
    (record,) = said.records
    assert re.match(how, record.getMessage())


@pytest.mark.parametrize("value", ["", "1"])
def test_variables_that_say_nothing(variables, said, value):
    variables({"SLURM_NTASKS": value, "OMPI_COMM_WORLD_SIZE": value})
    assert find(None, None, None) is None
    assert said.text == ""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x': must be a number"),
        (STEP | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS='': must be a number"),
        (STEP | {"SLURM_JOB_ID": "12²"}, "SLURM_JOB_ID='12²': must be a number"),
        (STEP | {"SLURM_PROCID": "8"}, "SLURM or Open MPI calls this process 8, of 8"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is empty"),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS=here: must be HOST:PORT"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "Open MPI does not say where process 0 is"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE='two': must be a number"),
    ],
)
def test_variables_that_cannot_be(variables, environment, message):
    variables(environment)
    with pytest.raises(InputError) as error:
        find(None, None, None)
    assert str(error.value).startswith(message)


def test_the_flags_come_before_the_variables(variables):
    variables(STEP)
    assert find("[::1]:5", 2, 0) == Launch("::1", 5, 2, 0)
    assert find("[::1]:5", 2, 0).address == "[::1]:5"
    assert find("here:12345", 1, 0) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("here", 1, 0), "--coordinator=here: must be HOST:PORT"),
        ((":5", 2, 0), "--coordinator=:5: must be HOST:PORT"),
        (("here:65536", 2, 0), "--coordinator=here:65536: must be HOST:PORT"),
        (("here:0", 2, 0), "--coordinator=here:0: must be HOST:PORT"),
        (("here:x", 2, 0), "--coordinator=here:x: must be HOST:PORT"),
        (("here:5", 2, 5), "--process_id=5: must be one of 0 to 1"),
        (("here:5", 2, -1), "--process_id=-1: must be one of 0 to 1"),
        (("here:5", 0, 0), "--num_processes=0: must be at least 1"),
        (("here:5", 2, None), "--coordinator, --num_processes and --process_id: give all three or none"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(InputError) as error:
        find(*flags)
    assert str(error.value).startswith(message)


def test_a_host_without_an_address():
    check_host(Launch("localhost", 5, 2, 1))
    for host in ("no-such-host.invalid", "a..b"):
        with pytest.raises(InputError, match=f"{host}:5: no such host"):
            check_host(Launch(host, 5, 2, 1))
