"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices and reads its own rows of every batch. Only
process 0 prints and writes files, except for checkpoints, which all processes write through Orbax.
"""

import hashlib
import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError

CLUSTERS = ("auto", "none", "slurm", "ompi", "k8s", "tpu")

# A process that sends no heartbeat for so long is considered dead, and the others exit. NCCL alone
# would wait for it forever.
HEARTBEAT_SECONDS = 60
_CONNECT_SECONDS = 300


def start(
    cluster: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process with the others of its run, if there are others.

    Must come before anything touches a device. The last three arguments default to the
    environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; where none of them
    is given, the cluster is asked.

    Args:
      cluster: one of CLUSTERS. 'auto' recognises SLURM steps, Open MPI, indexed Kubernetes jobs
        (where the package `kubernetes` is installed) and TPU slices of GKE; a Cloud TPU VM needs
        'tpu', since only the network knows what it is part of.
      coordinator: HOST:PORT where process 0 listens.
      num_processes: of the whole run.
      process_id: of this one, from 0.

    Raises:
      UserError: incomplete or contradictory arguments, or no connection.
    """
    arguments = _arguments(cluster, coordinator, num_processes, process_id)
    if arguments is None:
        return
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except KeyError as error:  # a variable that JAX expects of the cluster
        raise UserError(f"--cluster={cluster}: the environment variable {error} is missing; start "
                        "the processes with the cluster's own command, as launch/ does.") from error
    except (RuntimeError, ValueError) as error:
        where = arguments.get("coordinator_address") or f"the cluster ({cluster})"
        raise UserError(
            f"This process could not join its run through {where}: {first_line(error)}. Check that "
            "all processes were started, with the same address and each with its own number."
        ) from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # only process 0 prints; errors still go to stderr


def _arguments(cluster, coordinator, num_processes, process_id) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is called with; None for a run of one process."""
    given = {
        "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "--num_processes": _integer("JAX_NUM_PROCESSES", num_processes),
        "--process_id": _integer("JAX_PROCESS_ID", process_id),
    }
    if cluster == "none":
        if given_here := [flag for flag, value in (
                ("--coordinator", coordinator), ("--num_processes", num_processes),
                ("--process_id", process_id)) if value is not None]:
            raise UserError(f"{given_here[0]} has no effect with --cluster=none, a run of a single "
                            "process; leave one of them out.")
        return None
    local = {}
    if given["--coordinator"] and "OMPI_COMM_WORLD_SIZE" in os.environ:
        # Open MPI 5 no longer says where process 0 is, but still who is who.
        for flag, variable in (("--num_processes", "SIZE"), ("--process_id", "RANK")):
            if given[flag] is None:
                given[flag] = int(os.environ[f"OMPI_COMM_WORLD_{variable}"])
        local = {"local_device_ids": [int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])]}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        cluster = _detect() if cluster == "auto" else cluster
        methods = {"slurm": {"cluster_detection_method": "slurm"},
                   "ompi": {"cluster_detection_method": "ompi"}, "k8s": {}, "tpu": {}}
        return methods.get(cluster)
    if missing:
        raise UserError(
            f"A run of several processes needs --coordinator=HOST:PORT, --num_processes=N and "
            f"--process_id=I (or JAX_COORDINATOR_ADDRESS and so on); {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    address, count, index = given.values()
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator={address} is not HOST:PORT.")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be at least 0 and below --num_processes="
                        f"{count}.")
    if count == 1:
        return None
    return {"coordinator_address": address, "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate"} | local


def _integer(variable: str, value: int | None) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdigit():
        raise UserError(f"The environment variable {variable}={text!r} is not a number.")
    return int(text)


def _detect() -> str | None:
    """The cluster that started this process beside others."""
    environ = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(key in environ for key in slurm) and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError("This version of Open MPI does not say where process 0 runs; give "
                            "--coordinator=HOST:PORT, or --cluster=none for separate runs.")
        return "ompi"
    # A job of one pod is indexed too; the package shows that the pods are meant to meet.
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environ) and (
            importlib.util.find_spec("kubernetes")):
        return "k8s"
    if "," in environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", "")):
        return "tpu"
    return None


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, if a fact is not the same in all of them.

    Args:
      facts: what the fact is called in the message, and its value.
    """
    if jax.process_count() == 1:
        return
    ours = np.array([zlib.crc32(repr(value).encode()) for value in facts.values()], np.uint32)
    everyone = multihost_utils.process_allgather(ours)  # [processes, facts]
    for process, theirs in enumerate(everyone):
        equal = theirs == everyone[0]
        different = [name for name, same in zip(facts, equal, strict=True) if not same]
        if different:
            raise UserError(
                f"Process {process} and process 0 differ in the {' and the '.join(different)}; "
                "start all processes with the same command, on the same files."
            )


def total(count: int) -> int:
    """The sum of all processes' counts."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.array(count)).sum())


def distinct(names: Set[str]) -> int:
    """How many different names the processes have together."""
    if jax.process_count() == 1:
        return len(names)
    counts = multihost_utils.process_allgather(np.array(len(names)))
    ours = np.zeros((counts.max(), 4), np.uint32)  # all processes must send the same shape
    for row, name in zip(ours, names, strict=False):
        encoded = name.encode(errors="surrogateescape")
        row[:] = np.frombuffer(hashlib.blake2b(encoded, digest_size=16).digest(), np.uint32)
    everyone = multihost_utils.process_allgather(ours) if ours.size else ()
    return len({row.tobytes() for rows, count in zip(everyone, counts, strict=False)
                for row in rows[:count]})


def first_line(error: BaseException) -> str:
    """An error's first line, or its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
