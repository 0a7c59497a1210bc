"""The launch scripts. SLURM, gcloud, Kubernetes and GPUs are not here: stand-ins record what they
are asked for."""

import importlib.util
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TINY = f"--config={ROOT / 'tests' / 'tiny.py'}"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), *LAUNCH.glob("env/*.sh")])
PRESETS = sorted(path.stem for path in LAUNCH.glob("env/*.sh"))


def environment(*folders, **variables):
    """This process's, with `python` being this one unless a folder has another."""
    path = os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent),
                            os.environ["PATH"]])
    return {**os.environ, "PATH": path, **variables}


@pytest.fixture
def stand_in(tmp_path):
    """Makes a command that writes its arguments to the file that is returned, for `calls`, and then
    runs `then`. One line a call, since bash writes line by line, and calls may be made at once."""
    def make(name, then="exit 0", folder=tmp_path / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
        script, record = folder / name, tmp_path / f"{name}.calls"
        script.write_text(f"""#!/usr/bin/env bash
            arguments=$(printf '%s\\037' "$@" | tr '\\n' '\\036')
            echo "$arguments" >>"{record}"
            {then}\n""")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return record
    return make


def calls(record):
    """The arguments of every call."""
    if not record.exists():
        return []
    lines = record.read_text().removesuffix("\n").split("\n")
    return [line.removesuffix("\037").replace("\036", "\n").split("\037") for line in lines]


def run(*command, **kwargs):
    return subprocess.run([*map(str, command)], capture_output=True, text=True,
                          **{"cwd": ROOT, "timeout": 60} | kwargs)


# ---- The files themselves ------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_say_how_they_are_used(script):
    assert run("bash", "-n", script).returncode == 0
    text = script.read_text()
    if script.parent == LAUNCH:
        assert text.startswith("#!/usr/bin/env bash\n# ")
        assert f"launch/{script.name} " in text.split("\nset -uo pipefail\n")[0]  # the usage
        assert "JAX_COMPILATION_CACHE_DIR" in text
        assert len(text.splitlines()) < 65
    if script.suffix == ".sh" and script.parent == LAUNCH:
        assert os.access(script, os.X_OK)


SHELLCHECK = shutil.which("shellcheck", path=environment()["PATH"])


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = run(SHELLCHECK, "-x", script)
    assert done.returncode == 0, done.stdout


# ---- Environment presets -------------------------------------------------------------------------

def start_with(preset, *commands):
    """Starts JAX as a run would, on the CPU, whose jaxlib knows the GPU's flags too."""
    program = "; ".join(["import jax", "jax.devices()", *commands])
    return run("bash", "-c", f'{preset} && exec python -c "{program}"',
               env=environment(JAX_PLATFORMS="cpu"))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_only_what_jax_knows(preset):
    """An unknown XLA flag ends the program; an unknown JAX variable would be ignored in silence."""
    source = f". launch/env/{preset}.sh"
    done = start_with(source, "print(jax.config.jax_optimization_level)",
                      "print(jax.config.jax_remove_custom_partitioning_ptr_from_cache_key)")
    assert (done.returncode, done.stdout) == (0, "O1\nTrue\n"), done.stderr
    names = set(re.findall(r"export (\w+)", "".join(
        (LAUNCH / "env" / f"{name}.sh").read_text() for name in {preset, "gpu"})))
    for name in {name for name in names if name.startswith("JAX_")}:
        assert hasattr(jax.config, name.lower())
    assert names >= {"XLA_CLIENT_MEM_FRACTION", "JAX_OPTIMIZATION_LEVEL"}
    client = Path(importlib.util.find_spec("jaxlib.xla_client").origin).read_text()
    assert "'XLA_CLIENT_MEM_FRACTION'" in client


def test_an_unknown_flag_would_be_noticed():
    done = start_with("export XLA_FLAGS=--xla_gpu_no_such_flag=1")
    assert done.returncode != 0 and "Unknown flag in XLA_FLAGS" in done.stderr


def test_what_the_user_sets_wins():
    done = run("bash", "-c", ". launch/env/blackwell.sh && env", env=environment(
        XLA_FLAGS="--mine", XLA_CLIENT_MEM_FRACTION="0.5", CUDA_DEVICE_MAX_CONNECTIONS="1"))
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert variables["XLA_FLAGS"] == "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --mine"
    assert variables["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in variables  # Blackwell: see the preset


# ---- One machine ---------------------------------------------------------------------------------

COUNTED = '[ "$(grep -c "" "{record}")" -lt 3 ] && exit 75; exit {last}'


@pytest.mark.parametrize("restart, last, code, starts", [
    ("1", 0, 0, 3), ("1", 1, 1, 3), ("0", 0, 75, 1),
])
def test_local_starts_again_after_code_75(stand_in, tmp_path, restart, last, code, starts):
    record = stand_in("python", COUNTED.format(record=tmp_path / "python.calls", last=last))
    done = run(LAUNCH / "local.sh", "--workdir=a b", cwd=tmp_path,
               env=environment(tmp_path / "bin", RESTART=restart))
    assert done.returncode == code
    assert calls(record) == [["-m", "vit_jax.main", "--workdir=a b"]] * starts


@pytest.mark.parametrize("restart, number", [
    ("0", signal.SIGTERM), ("1", signal.SIGTERM), ("1", signal.SIGINT),
])
def test_local_passes_signals_on(stand_in, tmp_path, restart, number):
    """To the script alone, as a container's runtime sends them."""
    record = stand_in("python", f"""
        trap 'touch "{tmp_path}/saved"; exit 75' TERM
        touch "{tmp_path}/alive"
        for _ in {{1..600}}; do sleep 0.05; done""")
    process = subprocess.Popen([LAUNCH / "local.sh"],
                               env=environment(tmp_path / "bin", RESTART=restart))
    deadline = time.monotonic() + 30
    while not (tmp_path / "alive").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "saved").exists() and len(calls(record)) == 1


def test_local_takes_a_preset(stand_in, tmp_path):
    stand_in("python", 'echo "$CUDA_DEVICE_MAX_CONNECTIONS"')
    variables = environment(tmp_path / "bin")
    variables.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    assert run(LAUNCH / "local.sh", env=variables | {"PRESET": "hopper"}).stdout == "1\n"
    done = run(LAUNCH / "local.sh", env=variables | {"PRESET": "hoper"})
    assert done.returncode == 1 and "hoper" in done.stderr and not done.stdout


# ---- Rehearsal of several hosts ------------------------------------------------------------------

@pytest.fixture
def rehearse(stand_in, tmp_path):
    """Starts a rehearsal in which process I lives as `lives[I]` says, and waits until all do."""
    def start(*lives, **variables):
        cases = "".join(f'*"--process_id={i} "*) {life};; ' for i, life in enumerate(lives))
        record = stand_in("python", f"""
            [ "$1" = -c ] && exec {sys.executable} "$@"
            trap "exit 75" TERM
            touch "{tmp_path}/alive.$$"
            case "$* " in {cases} esac""")
        process = subprocess.Popen(
            [LAUNCH / "processes.sh", str(len(lives)), "--workdir=a b"], stderr=subprocess.PIPE,
            text=True, env=environment(tmp_path / "bin", LOGS=str(tmp_path / "logs"), **variables))
        deadline = time.monotonic() + 30
        while len(alive := list(tmp_path.glob("alive.*"))) < len(lives):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process, [int(path.suffix[1:]) for path in alive], record
    return start


FOREVER = "while true; do sleep 0.05; done"


def end(process, pids):
    """Exit code and stderr; none of the processes may be left."""
    _, err = process.communicate(timeout=30)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_rehearsal_passes_signals_on(rehearse, number):
    process, pids, record = rehearse(FOREVER, FOREVER, FOREVER)
    process.send_signal(number)
    code, err = end(process, pids)
    assert code == 75 and all(f"process {i} ended with code 75" in err for i in range(3))
    started = [call for call in calls(record) if call[0] == "-m"]
    assert {call[-1] for call in started} == {f"--process_id={i}" for i in range(3)}
    (address,) = {call[-3] for call in started}  # the same for all
    assert re.fullmatch(r"--coordinator=localhost:\d+", address)
    assert all(call[1:3] == ["vit_jax.main", "--workdir=a b"] for call in started)


def test_rehearsal_in_which_a_process_dies(rehearse):
    """The other does not notice, and TERM would not end it."""
    process, pids, _ = rehearse("trap '' TERM; " + FOREVER, "kill -KILL $$", GRACE="0")
    code, err = end(process, pids)
    assert code == 128 + signal.SIGKILL
    assert "process 1 ended with code 137" in err
    assert "killing the processes that do not end" in err and "process 0 ended with code 137" in err


@pytest.mark.parametrize("lives, expected", [
    (("exit 0", "exit 0"), 0),
    (("exit 75", "exit 75"), 75),
    (("exit 75", "sleep 0.5; exit 3"), 3),  # one did not save
    (("sleep 0.5; exit 3", "exit 1"), 1),  # the first to fail is the cause
], ids=str)
def test_exit_code_of_a_rehearsal(rehearse, lives, expected):
    process, pids, _ = rehearse(*lives)
    assert end(process, pids)[0] == expected


@pytest.mark.parametrize("arguments", [[], ["0"], [TINY]], ids=str)
def test_rehearsal_needs_a_number(arguments):
    done = run(LAUNCH / "processes.sh", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the first argument is the number of processes")


# ---- SLURM ---------------------------------------------------------------------------------------

def directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    pairs = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M)
    # sbatch stops to read them at the first command.
    assert text.rindex("#SBATCH") < text.index("\nset -uo pipefail\n")
    return dict(pairs)


def test_slurm_directives():
    asked = directives()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one process per GPU
    assert "gpus-per-task" not in asked  # would hide the GPUs that JAX numbers by SLURM_LOCALID
    assert int(asked["cpus-per-task"]) > 1
    assert asked["signal"] == "TERM@120"  # to the tasks; "B:" would be to the shell alone
    assert asked["open-mode"] == "append" and "requeue" in asked


@pytest.mark.parametrize("code, restarts, requeued", [
    (75, None, True), (75, "19", True), (75, "20", False), (0, None, False), (1, None, False),
    (143, "3", False),
])
def test_slurm_requeues_what_was_saved(stand_in, tmp_path, code, restarts, requeued):
    srun, scontrol = stand_in("srun", f"exit {code}"), stand_in("scontrol")
    # SLURM runs a copy of the script, somewhere.
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    count = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = run("bash", script, TINY, "--workdir=a b", cwd=tmp_path, env=environment(
        tmp_path / "bin", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="12",
        **count))
    assert done.returncode == code, done.stderr
    (call,) = calls(srun)
    start = call.index("python")
    assert call[start:] == ["python", "-m", "vit_jax.main", "--cluster=slurm", TINY,
                            "--workdir=a b"]
    assert set(call[:start]) == {"--cpus-per-task=12", "--kill-on-bad-exit=0"}
    assert calls(scontrol) == ([["requeue", "7"]] if requeued else [])


# ---- Cloud TPU -----------------------------------------------------------------------------------

def test_tpu_runs_the_command_on_the_hosts(stand_in, tmp_path):
    """The stand-in for gcloud runs the command like the hosts' shells would."""
    gcloud = stand_in("gcloud", 'for a in "$@"; do case "$a" in --command=*) '
                      'cd "$HOME" && bash -c "${a#--command=}"; exit;; esac; done')
    home = tmp_path / "home"
    python = stand_in("python", COUNTED.format(record=tmp_path / "python.calls", last=0),
                      folder=home / "vit_jax" / ".venv" / "bin")
    done = run(LAUNCH / "tpu_pod.sh", "run", "pod", "zone", "--workdir=/mnt/a b", "--x=$HOME;'",
               env=environment(tmp_path / "bin", HOME=str(home), RESTART="1"), cwd=home)
    assert done.returncode == 0, done.stderr
    assert calls(python) == [["-m", "vit_jax.main", "--cluster=tpu", "--workdir=/mnt/a b",
                              "--x=$HOME;'"]] * 3
    assert calls(gcloud)[0][:7] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone",
                                    "--worker=all"]


def test_tpu_setup_brings_the_checkout(stand_in, tmp_path):
    gcloud = stand_in("gcloud", f'[ "$4" = scp ] && cp "$5" "{tmp_path}"; exit 0')
    done = run(LAUNCH / "tpu_pod.sh", "setup", "pod", "zone", env=environment(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    names = run("tar", "-tzf", tmp_path / "vit_jax.tar.gz").stdout.split()
    assert {"setup.py", "vit_jax/main.py"} <= set(names)
    copy, install = calls(gcloud)
    assert copy[3] == "scp" and copy[5:] == ["pod:", "--zone=zone", "--worker=all"]
    assert install[3] == "ssh" and any("--editable '.[tpu]'" in word for word in install)


@pytest.mark.parametrize("arguments", [[], ["run", "pod"], ["walk", "pod", "zone"]], ids=str)
def test_tpu_usage(stand_in, tmp_path, arguments):
    gcloud = stand_in("gcloud")
    done = run(LAUNCH / "tpu_pod.sh", *arguments, env=environment(tmp_path / "bin"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and not calls(gcloud)


# ---- Kubernetes ----------------------------------------------------------------------------------

@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_jobset_structure(jobset):
    """Names and values of JobSet v1alpha2 and batch/v1 Job, from their published schemas."""
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert set(spec["failurePolicy"]) <= {"maxRestarts", "restartStrategy", "rules"}
    (rule,) = spec["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.pop("name"))
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"]}

    (replicated,) = spec["replicatedJobs"]
    assert set(replicated) == {"name", "template"}
    job = replicated["template"]["spec"]
    assert set(job) == {"completionMode", "completions", "parallelism", "backoffLimit",
                        "podFailurePolicy", "template"}
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert pod["terminationGracePeriodSeconds"] == 120
    (container,) = pod["containers"]
    exits, evictions = job["podFailurePolicy"]["rules"]
    assert exits == {"action": "FailJob", "onExitCodes": {
        "containerName": container["name"], "operator": "In", "values": [75]}}
    assert evictions == {"action": "FailJob", "onPodConditions": [
        {"type": "DisruptionTarget", "status": "True"}]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    assert "/dev/shm" in {v["mountPath"] for v in container["volumeMounts"]}


def test_jobset_tells_every_process_its_place(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", entry.get("valueFrom"))
                 for entry in container["env"]}
    hosts = job["completions"]
    assert job["parallelism"] == hosts and variables["JAX_NUM_PROCESSES"] == str(hosts)
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0"
    port = container["ports"][0]["containerPort"]
    assert variables["JAX_COORDINATOR_ADDRESS"] == (
        f"{host}.{jobset['spec']['network']['subdomain']}:{port}")
    assert variables["JAX_PROCESS_ID"] == {"fieldRef": {
        "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert "JAX_COMPILATION_CACHE_DIR" in variables


def test_jobset_command_starts_python_itself(jobset, stand_in, tmp_path):
    """SIGTERM goes to the process that the command became."""
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    record = stand_in("python", "echo $$")
    process = subprocess.Popen([*container["command"], *container["args"]], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, env=environment(tmp_path / "bin"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and int(out) == process.pid
    (call,) = calls(record)
    assert call[:2] == ["-m", "vit_jax.main"]
    (config,) = [word for word in call if word.startswith("--config=")]
    assert (ROOT / config.removeprefix("--config=").split(":")[0]).is_file()
