"""Files of deploy/: what they name is there, signals arrive, and a stopped run goes on."""

import ast
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml
from support import fake_slurm
from test_commands_flags import flags_of

ROOT = pathlib.Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
# Statuses of train_main.py (docs/scaling.md)
MEND, GO_ON = [2], [75, 129, 130, 143]


# ------------------------------------------------------------------ image
def stages():
    """Instructions of the Dockerfile by stage, those that a stage starts from included."""
    found, name = {}, ""
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            name = start[2]
            found[name] = list(found.get(start[1], []))
        elif line and not line.startswith("#"):
            found[name].append(line.split(" ", 1))
    return found


@pytest.mark.parametrize("stage", ["cuda", "tpu"])
def test_an_image_holds_what_its_commands_need(stage):
    copied, extras, entry = [], set(), None
    for word, rest in stages()[stage]:
        if word == "COPY":
            *sources, target = rest.split()
            assert len(sources) > 1 or target in ("./", sources[0])
            copied += sources
        elif word == "RUN":
            extras |= set(re.findall(r"'\.\[([\w,]+)\]'", rest))
            if "'." in rest:
                assert "--editable" in rest and "pyproject.toml" in copied
            if "--constraint" in rest:
                assert "constraints.txt" in copied
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)  # a list: a text would be a shell's, which gets the signals
        elif word == "CMD":
            assert (ROOT / json.loads(rest)[0]).is_file() and json.loads(rest)[0] in copied
    assert entry == ["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras and extras <= project["optional-dependencies"].keys()
    shipped = ast.literal_eval(re.search(r"SHIPPED = (\(.*\))", (ROOT / "setup.py").read_text())[1])
    needed = {"pyproject.toml", "setup.py", "microdit_jax", project["readme"], *shipped}
    assert needed <= set(copied) and all((ROOT / name).exists() for name in copied)
    assert all(name.split("/")[0] in copied for name in project["license-files"])
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in kept if line.startswith("!")}


# ------------------------------------------------------------------ manifests
# The fields of JobSet v1alpha2 and of batch/v1 and core/v1 that the manifests use, as published.
SCHEMA = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
                    "action": "FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts|"
                    "RestartJob|RestartJobAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy|BackoffLimitExceeded"],
                    "onJobFailureMessagePatterns": [str],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": "Indexed",
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": "FailJob|FailIndex|Ignore|Count",
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": "In|NotIn",
                                        "values": [int],
                                    },
                                    "onPodConditions": [{"type": str, "status": "True|False"}],
                                }
                            ]
                        },
                        "template": {"spec": dict},
                    }
                },
            }
        ],
    },
}


def check(found, schema, path=""):
    if isinstance(schema, dict):
        assert isinstance(found, dict) and not found.keys() - schema.keys(), path
        for name, value in found.items():
            check(value, schema[name], f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(found, list) and found, path
        for item in found:
            check(item, schema[0], f"{path}[]")
    elif isinstance(schema, str):
        assert isinstance(found, str) and re.fullmatch(schema, found), (path, found)
    else:
        assert type(found) is schema, (path, found)


@pytest.mark.parametrize("name", ["jobset-gpu.yaml", "jobset-tpu.yaml"])
def test_a_manifest_is_a_jobset_that_goes_on(name):
    text = (DEPLOY / name).read_text()
    manifest = yaml.safe_load(text)
    check(manifest, SCHEMA)
    rules = manifest["spec"]["failurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    (job,) = manifest["spec"]["replicatedJobs"]
    job, replicas, job_name = job["template"]["spec"], job["replicas"], job["name"]
    assert job["backoffLimit"] == 0 and job["parallelism"] == job["completions"]
    # Kubernetes's message of a failed pod, which the first rule reads
    (pattern,) = rules[0]["onJobFailureMessagePatterns"]
    told = "Container trainer for pod a/b failed with exit code {} matching FailJob rule at index 0"
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"][:2]]
    assert [code["values"] for code in codes] == [MEND, GO_ON]
    assert [n for n in MEND + GO_ON if re.search(pattern, told.format(n))] == MEND
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert {code["containerName"] for code in codes} == {container["name"]}
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # No shell stands between the pod and Python.
    assert container["command"] == ["python", "train_main.py"]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert given.keys() <= flags_of("train_main")
    assert f"find {given['health_file']} " in container["livenessProbe"]["exec"]["command"][2]
    config, _, mesh = given["config"].partition(":mesh=")
    chips = int(next(iter(container["resources"]["limits"].values())))
    data, fsdp, expert = map(int, mesh.split("x"))
    count = replicas * job["parallelism"] * chips
    assert (ROOT / config).is_file() and (data * fsdp * expert in (count, -fsdp * expert))
    named = {variable["name"] for variable in container["env"]} | {"JOB_COMPLETION_INDEX"}
    assert set(re.findall(r"\$\((\w+)\)", text)) <= named
    if "coordinator_address" in given:
        label = manifest["metadata"]["name"]
        assert given["coordinator_address"] == f"{label}-{job_name}-0-0.{label}:8476"
        assert int(given["num_processes"]) == job["parallelism"] and replicas == 1


# ------------------------------------------------------------------ SLURM
def submit(folder, python, *arguments, tasks=2, **environment):
    """Starts the job script with a stand-in for Python."""
    environment = fake_slurm.install(folder, tasks=tasks) | environment
    stand_in = folder / "bin/python"
    stand_in.write_text(f"#!{sys.executable}\n{python}")
    stand_in.chmod(0o755)
    environment |= {"WORKDIR": str(folder / "run"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["bash", DEPLOY / "train.sbatch", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


REQUEUE = [f"scontrol requeue {os.getpid()}"]


@pytest.mark.parametrize(
    "status, restarts, expected",
    [(0, 0, []), (75, 0, REQUEUE), (143, 0, REQUEUE), (2, 0, []), (1, 0, [])]
    + [(137, 9, REQUEUE), (137, 10, [])],
)
def test_the_job_script_queues_again_what_was_stopped(tmp_path, status, restarts, expected):
    python = (
        "import os, sys\n"
        "os.write(1, (' '.join(sys.argv[1:]) + chr(10)).encode())\n"  # whole lines of two tasks
        f"sys.exit({status})\n"
    )
    job = submit(tmp_path, python, "--config.seed=3", SLURM_RESTART_COUNT=str(restarts))
    said, errors = job.communicate(timeout=60)
    assert job.returncode == status and not errors
    assert fake_slurm.calls(tmp_path) == expected
    health = f"--health_file=/tmp/microdit-health-{os.getpid()}"
    line = "train_main.py --config=configs/recipe.py:mesh=-1x8x1"
    assert said.splitlines() == [f"{line} --workdir={tmp_path}/run {health} --config.seed=3"] * 2


def test_the_tasks_find_each_other(tmp_path):
    python = (
        "import os\n"
        "from microdit_jax.machine.cluster import find_job\n"
        "job = find_job(None, None, None)\n"
        "about = job.process_id, job.num_processes, job.coordinator_address, job.local_device_ids\n"
        "os.write(1, (' '.join(map(str, about)) + chr(10)).encode())\n"
    )
    job = submit(tmp_path, python)
    said, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    first, second = sorted(said.splitlines())
    assert first.startswith("0 2 localhost:") and second == first.replace("0", "1", 1)


def test_a_signal_to_the_script_leaves_it_to_queue_again(tmp_path):
    """As on a preemption that signals all; the tasks save, and end with 75."""
    python = (
        "import pathlib, signal, sys, time\n"
        f"started = pathlib.Path({str(tmp_path)!r}, 'started')\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
        "started.touch()\n"
        "time.sleep(60)\n"
    )
    job = submit(tmp_path, python, tasks=1)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < until:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75, errors
    assert fake_slurm.calls(tmp_path) == REQUEUE


def test_a_run_that_hangs_is_ended_and_goes_on(tmp_path):
    python = (
        "import os, sys, time\n"
        "file = next(a for a in sys.argv if a.startswith('--health_file=')).split('=')[1]\n"
        "open(file, 'w').close()\n"
        "os.utime(file, (1000, 1000))\n"
        "time.sleep(60)\n"
    )
    job = submit(tmp_path, python, HEALTH_EVERY="0.2")
    said, errors = job.communicate(timeout=60)
    assert job.returncode == 137 and "no sign of life" in said, errors
    assert fake_slurm.calls(tmp_path) == [f"scancel --signal=KILL {os.getpid()}", *REQUEUE]
    pathlib.Path(f"/tmp/microdit-health-{os.getpid()}").unlink()


def test_the_job_script_needs_a_workdir(tmp_path):
    environment = fake_slurm.install(tmp_path)
    environment.pop("WORKDIR", None)
    found = subprocess.run(
        ["bash", DEPLOY / "train.sbatch"], env=environment, capture_output=True, text=True
    )
    assert found.returncode and "expected WORKDIR, a folder that all nodes share" in found.stderr
