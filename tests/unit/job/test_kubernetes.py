"""The PyTorchJob in launch/kubernetes: what the operator makes of it starts the ranks that it describes.

The operator's variables are those of setPodEnv in pkg/controller.v1/pytorch/envvar.go and master.go of
kubeflow/training-operator at 13935a9c. The manifest was compared with its CustomResourceDefinition there.
"""

import pytest
import yaml
from torch.distributed import run

from megachat.commands import main as cli
from megachat.config import load_config
from megachat.errors import UserError
from megachat.job.launchers import find_launch
from tests.runs.forked import ROOT

MANIFEST = ROOT / "launch" / "kubernetes" / "pytorchjob.yaml"


@pytest.fixture(scope="module")
def job() -> dict:
    return yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))


def operators_variables(job: dict, replica: str, index: int) -> dict[str, str]:
    """What the operator adds to the environment of a pod."""
    spec = job["spec"]
    nodes = sum(each["replicas"] for each in spec["pytorchReplicaSpecs"].values())
    ranks, node = int(spec["nprocPerNode"]), index + (replica == "Worker")
    master, port = f"{job['metadata']['name']}-master-0", "23456"
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_PORT": port,
        "PET_MASTER_PORT": port,
        "MASTER_ADDR": master,
        "PET_MASTER_ADDR": master,
        "WORLD_SIZE": str(nodes * ranks),
        "RANK": str(node),
        "PET_NODE_RANK": str(node),
        "PET_NPROC_PER_NODE": spec["nprocPerNode"],
        "PET_NNODES": str(nodes),
    }


def test_the_manifest_is_one_that_the_operator_takes(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert isinstance(job["spec"]["nprocPerNode"], str), "its schema has a string"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1 and {each["restartPolicy"] for each in replicas.values()} == {
        "OnFailure"
    }
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "in which the operator sets the port"
        assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
        variables = {each["name"]: each["value"] for each in container["env"]}
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert variables["MEGACHAT_SECRET_FILE"].startswith(mounts["secret"] + "/")
        (secret,) = (each["secret"] for each in pod["volumes"] if each["name"] == "secret")
        assert secret["defaultMode"] == 0o400
        stop_s = float(
            dict(word[6:].split("=") for word in container["command"] if "--set=" in word)["checkpoint.stop_s"]
        )
        assert stop_s < float(variables["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("replica", "index", "node"), [("Master", 0, 0), ("Worker", 0, 1)])
def test_the_operators_variables_start_the_ranks(job, replica, index, node, monkeypatch):
    container = job["spec"]["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"][0]
    variables = {each["name"]: each["value"] for each in container["env"]} | operators_variables(job, replica, index)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    program, *words = container["command"]
    assert program == "torchrun"
    options = run.parse_args(words)
    config, _, arguments = run.config_from_args(options)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_endpoint, config.rdzv_configs["rank"]) == ("megachat-master-0:23456", node)
    assert config.shutdown_timeout == 150
    start = arguments.index("launch/pretrain.py") + 1
    parsed = cli.build_parser("pretrain", "pretrain").parse_args(arguments[start:])
    settings = load_config(parsed.config, parsed.set)
    assert parsed.resume == "auto" and str(settings.run.folder) == "/shared/runs"
    assert settings.checkpoint.stop_s == 140 and (ROOT / parsed.config).is_file()
    # what torchrun sets for its ranks replaces what the operator set for the pod
    ranks = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    launch = find_launch(variables | ranks)
    assert launch and (launch.rank, launch.world, launch.local_rank, launch.local_size) == (9, 16, 1, 8)


def test_python_in_a_pod_of_several_ranks_is_refused(job):
    """It would be one rank, of the number of all pods' ranks."""
    with pytest.raises(UserError, match="PET_NNODES and PET_NPROC_PER_NODE of this pod are for torchrun"):
        find_launch(operators_variables(job, "Worker", 0))
    job["spec"]["nprocPerNode"] = "1"
    launch = find_launch(operators_variables(job, "Worker", 0))
    assert launch and (launch.rank, launch.world) == (1, 2)
