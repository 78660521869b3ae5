"""Which processes make up a run: those of the command's flags, or of what started them, SLURM's srun or Open MPI."""

import logging
import os
import re
import socket
from typing import NamedTuple

from dataflex_jax.errors import InputError

logger = logging.getLogger(__name__)

# As JAX chooses it: the last 4096 ports, by the number of the job.
_FIRST_PORT, _PORTS = 61440, 4096
_LAUNCHER = "OMPI_MCA_orte_hnp_uri"


class Launch(NamedTuple):
    """One process among those of a run.

    Attributes:
        host: where process 0 listens.
        port: there.
        count: how many processes there are.
        process: which of them this is, 0 .. count - 1.
        device: its only GPU, as a number on its host; None: all of its host.
    """

    host: str
    port: int
    count: int
    process: int
    device: int | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Launch | None:
    """The processes of the flags, else of the SLURM step or the Open MPI job that this process is a part of.

    Returns:
        None: it is alone. That is said where the environment names several processes, but none of them is this one,
        as in the shell of an allocation.

    Raises:
        InputError: flags that cannot be, or variables of SLURM or Open MPI that are no numbers.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        launch = _of_flags(*given)
    elif "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        launch = _of_slurm()
    elif "OMPI_COMM_WORLD_RANK" in os.environ:
        launch = _of_open_mpi()
    else:
        launch = None
    if launch is not None and launch.count > 1:
        return launch
    if launch is None or "SLURM_NTASKS" in os.environ:
        _say_alone()
    return None


def _of_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Launch:
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("--coordinator, --num_processes and --process_id: give all three or none")
    if num_processes < 1:
        raise InputError("must be at least 1", option="--num_processes", value=num_processes)
    if not 0 <= process_id < num_processes:
        reason = f"must be one of 0 to {num_processes - 1}, as there are --num_processes={num_processes}"
        raise InputError(reason, option="--process_id", value=process_id)
    host, port = _host_and_port("--coordinator", coordinator)
    return Launch(host, port, num_processes, process_id, _device())


def _host_and_port(name: str, address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise InputError(f"{name}={address}: must be HOST:PORT, such as node001:12345")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_host(launch: Launch) -> None:
    """Refuses a host that has no address.

    Raises:
        InputError: names it.
    """
    try:
        socket.getaddrinfo(launch.host, launch.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{launch.address}: no such host ({error}); process 0's is needed") from error


def _of_slurm() -> Launch:
    count = _number("SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS")
    # The first of "node[001-004,7],other" or of "node001,other".
    first = re.match(r"([^\[,]+)(?:\[([^-,\]]+))?", os.environ["SLURM_STEP_NODELIST"])
    if first is None:
        raise InputError("SLURM_STEP_NODELIST is empty: it must name the nodes of the step, as srun sets it")
    return _launch("".join(filter(None, first.groups())), _number("SLURM_JOB_ID"), count, _number("SLURM_PROCID"))


def _of_open_mpi() -> Launch:
    count, process = _number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_RANK")
    if count == 1 or "JAX_COORDINATOR_ADDRESS" in os.environ:
        return _launch("", 0, count, process)
    # Such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or 1314521088.0;tcp6://[fe80::b9b,2620:10d::2]:43370.
    uri = re.match(r"(\d+)\..*?;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", os.environ.get(_LAUNCHER, ""))
    if uri is None:
        raise InputError(
            f"Open MPI does not say where process 0 is (no {_LAUNCHER}); set JAX_COORDINATOR_ADDRESS=HOST:PORT"
        )
    return _launch(uri[2], int(uri[1]) >> 12, count, process)


def _launch(host: str, job: int, count: int, process: int) -> Launch:
    if not 0 <= process < count:
        raise InputError(
            f"SLURM or Open MPI calls this process {process}, of {count}: it must be one of 0 to count - 1"
        )
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        host, port = _host_and_port("JAX_COORDINATOR_ADDRESS", address)
    elif "JAX_COORDINATOR_PORT" in os.environ:
        port = _number("JAX_COORDINATOR_PORT")
    else:
        port = _FIRST_PORT + job % _PORTS
    return Launch(host, port, count, process, _device())


def _device() -> int | None:
    """Where a node has several of the processes, each has one GPU; else it has all."""
    for several, own in (
        (not re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")), "SLURM_LOCALID"),
        (os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if several and own in os.environ:
            return _number(own)
    return None


def _say_alone() -> None:
    for name, how in (("SLURM_NTASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")):
        if os.environ.get(name, "1") not in ("", "1"):
            logger.info(
                "%s=%s, but this process was not started by %s: it runs alone; start it with %s to have them all",
                name,
                os.environ[name],
                how,
                how,
            )


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not re.fullmatch(r"\d{1,10}", value, re.ASCII):
        raise InputError(f"{name}={value!r}: must be a number, as SLURM and Open MPI set it; or unset it to run alone")
    return int(value)
