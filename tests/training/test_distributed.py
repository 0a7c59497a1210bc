"""How processes find each other: what `jax.distributed.initialize` is called with; and counting."""

import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from vit_jax.errors import UserError
from vit_jax.training import distributed

pytestmark = pytest.mark.core

OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2",
         "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}  # fmt: skip


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of every call, with the timeouts left out; a clean environment."""
    for name in (*OMPI, *SLURM, "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST",
                 "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES",
                 "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []

    def initialize(*, initialization_timeout, heartbeat_timeout_seconds, **arguments):
        assert heartbeat_timeout_seconds == distributed.HEARTBEAT_SECONDS
        calls.append(arguments)

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    return calls


EXPLICIT = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1,
            "cluster_detection_method": "deactivate"}


def test_a_run_of_its_own(initialized):
    distributed.start()
    distributed.start(coordinator="a:1", num_processes=1, process_id=0)
    assert initialized == []


def test_flags(initialized):
    distributed.start(coordinator="a:1", num_processes=2, process_id=1)
    assert initialized == [EXPLICIT]


def test_environment(initialized, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    distributed.start()
    distributed.start(coordinator="a:1")  # a flag wins
    distributed.start("none")
    assert initialized == [EXPLICIT | {"coordinator_address": "b:2"}, EXPLICIT]


@pytest.mark.parametrize("variables, method", [
    (SLURM, "slurm"),
    (SLURM | {"SLURM_NTASKS": "1"}, None),  # an interactive shell
    ({key: SLURM[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")}, None),  # outside srun
    (OMPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "ompi"),
    (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
])  # fmt: skip
def test_clusters(initialized, monkeypatch, variables, method):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    assert initialized == ([{"cluster_detection_method": method}] if method else [])


def test_a_tpu_slice(initialized, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0")
    distributed.start()  # a single host
    assert initialized == []
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    distributed.start()
    distributed.start("tpu")
    assert initialized == [{}, {}]  # JAX finds the rest


@pytest.mark.parametrize("installed", [True, False])
def test_an_indexed_kubernetes_job(initialized, monkeypatch, installed):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: installed or None)
    distributed.start()
    assert initialized == ([{}] if installed else [])


def test_open_mpi_5(initialized, monkeypatch):
    """It says who this is, and the user where process 0 is."""
    for name, value in OMPI.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--coordinator=HOST:PORT, or --cluster=none"):
        distributed.start()
    distributed.start(coordinator="a:1")
    assert initialized == [EXPLICIT | {"local_device_ids": [1]}]


@pytest.mark.parametrize("arguments, message", [
    (dict(coordinator="a:1"), "--num_processes and --process_id are missing"),
    (dict(num_processes=2, process_id=0), "--coordinator is missing"),
    (dict(coordinator="a", num_processes=2, process_id=0), "--coordinator=a is not HOST:PORT"),
    (dict(coordinator="a:1", num_processes=2, process_id=2), "--process_id=2 must be"),
    (dict(cluster="none", num_processes=2), "--num_processes has no effect with --cluster=none"),
])  # fmt: skip
def test_mistakes(initialized, arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(**arguments)
    assert initialized == []


def test_a_variable_that_is_no_number(initialized, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two' is not a number"):
        distributed.start()


def test_no_connection(monkeypatch, initialized):
    def initialize(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier\nmore")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(UserError, match="through a:1: DEADLINE_EXCEEDED: barrier. Check"):
        distributed.start(coordinator="a:1", num_processes=2, process_id=1)


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: {}["SLURM_JOB_ID"])
    with pytest.raises(UserError, match="--cluster=slurm: the environment variable 'SLURM_JOB_ID'"):
        distributed.start(cluster="slurm")


@pytest.mark.parametrize("names", [
    [{"a.png", "b.png"}, {"b.png", "c.png", "\udcff.png"}, set()], [set(), set()], [{"a"}, {"a"}],
], ids=["three", "none", "the same"])
def test_names_that_several_processes_have_count_once(monkeypatch, names):
    """Threads in place of processes."""
    sent, found = {}, []
    barrier = threading.Barrier(len(names))

    def allgather(array):
        sent[threading.current_thread().name] = array
        barrier.wait()
        everyone = np.stack([sent[str(i)] for i in range(len(names))])
        barrier.wait()
        return everyone

    monkeypatch.setattr(jax, "process_count", lambda: len(names))
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    threads = [threading.Thread(target=lambda own=own: found.append(distributed.distinct(own)),
                                name=str(i)) for i, own in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [len(set.union(*names))] * len(names)
