"""The manifests for Kubernetes: their schemas, what pods may do, and that they fit together."""

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate")

DOCKER = Path(__file__).parents[3] / "docker"
FILES = ("kubernetes.yaml", "ray-cluster.yaml", "vllm.yaml")
KUBERNETES = "1.37"
RAY_CLUSTER = json.loads((Path(__file__).parent / "raycluster.json").read_text())
SECRET = re.compile("PASSWORD|TOKEN$|AUTH_STRING$|DATABASE$")


def documents(file):
    return list(yaml.safe_load_all((DOCKER / file).read_text()))


def ray_cluster(found=None):
    found = found or documents("ray-cluster.yaml")
    return next(document for document in found if document["kind"] == "RayCluster")


def with_gpus():
    """docker/ray-cluster.yaml as the command in its head makes it."""
    (words,) = re.findall(r"^#   (sed .*) \|", (DOCKER / "ray-cluster.yaml").read_text(), re.M)
    run = subprocess.run(
        words, shell=True, cwd=DOCKER.parent, capture_output=True, check=True, text=True
    )
    return list(yaml.safe_load_all(run.stdout))


def job():
    """docker/kubernetes-job.json with the values that it gives its variables."""
    text = (DOCKER / "kubernetes-job.json").read_text()
    values = {"name": "demo", "labels": {"team": "a"}}
    for name, declared in json.loads(text)["variables"]["properties"].items():
        value = values.get(name, declared.get("default"))
        text = text.replace(f'"{{{{ {name} }}}}"', json.dumps(value))
        text = text.replace(f"{{{{ {name} }}}}", str(value))
    return json.loads(text)["job_configuration"]["job_manifest"]


def pods_of(document):
    """Its pod specifications, by name."""
    spec = document.get("spec", {})
    if document["kind"] == "RayCluster":
        groups = {"head": spec["headGroupSpec"]}
        groups |= {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        return {f"ray {name}": group["template"]["spec"] for name, group in groups.items()}
    if "template" in spec:
        return {document["kind"]: spec["template"]["spec"]}
    return {}


PODS = {
    name: pod
    for document in (job(), *(found for file in FILES for found in documents(file)))
    for name, pod in pods_of(document).items()
}


def validate(document):
    if document["kind"] != "RayCluster":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.validate(document, RAY_CLUSTER)
    for pod in pods_of(document).values():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize("file", FILES)
def test_a_manifest_is_what_its_schema_allows(file):
    for document in documents(file):
        validate(document)


def test_a_ray_cluster_with_gpus_is_too():
    found = ray_cluster(with_gpus())
    validate(found)
    limits = pods_of(found)["ray nodes"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "1"}


def test_the_job_of_a_run_is_too():
    made = job()
    pod = made["spec"]["template"]["spec"]
    # prefect-kubernetes wants them in the pod, where Kubernetes ignores them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    validate(made)


@pytest.mark.parametrize(
    "change",
    [
        {"rayVerson": "2.60.0"},
        {"headGroupSpec": {"rayStartParams": {"num-cpus": 0}, "template": {"spec": {}}}},
        {"workerGroupSpecs": [{"groupName": "nodes"}]},
    ],
)
def test_the_schema_of_a_ray_cluster_refuses(change):
    found = ray_cluster()
    found["spec"] |= change
    with pytest.raises(jsonschema.ValidationError):
        validate(found)


def test_a_misspelt_field_of_a_pod_is_refused():
    found = ray_cluster()
    pods_of(found)["ray head"]["containers"][0]["imagePullPolcy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(found)


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_can_do_no_more_than_it_needs(pod):
    spec = PODS[pod]
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for variable in container["env"]:
        assert ("valueFrom" in variable) == bool(SECRET.search(variable["name"])), variable


@pytest.mark.parametrize("pod", PODS)
def test_an_image_has_a_release(pod):
    (container,) = PODS[pod]["containers"]
    name, _, tag = container["image"].rpartition(":")
    assert re.search(r"\d+\.\d+\.\d+", tag), f"{name} has no release"


def test_a_pod_that_fails_is_not_started_again_by_itself():
    text = (DOCKER / "kubernetes-job.json").read_text()
    manifest = json.loads(text)["job_configuration"]["job_manifest"]
    assert manifest["spec"]["backoffLimit"] == 0
    assert manifest["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(
        json.loads(text)["variables"]["properties"]
    )


def environment(pod):
    (container,) = PODS[pod]["containers"]
    return {variable["name"]: variable for variable in container["env"]}


def test_the_nodes_of_a_ray_cluster_have_its_token_and_no_other_secret():
    head, nodes = environment("ray head"), environment("ray nodes")
    assert {name for name in nodes if "valueFrom" in nodes[name]} == {"RAY_AUTH_TOKEN"}
    assert all(nodes[name] == head[name] for name in nodes)
    assert nodes["RAY_AUTH_MODE"]["value"] == "token"


def test_a_run_finds_as_many_nodes_as_it_has_processes():
    spec = ray_cluster()["spec"]
    (group,) = spec["workerGroupSpecs"]
    head, (node,) = environment("ray head"), PODS["ray nodes"]["containers"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert int(head["RLHF_PROCESSES"]["value"]) == group["replicas"]
    assert head["RLHF_CLUSTER_CPUS"]["value"] == node["resources"]["limits"]["cpu"]


def test_the_release_of_ray_is_the_one_that_is_pinned():
    release = ray_cluster()["spec"]["rayVersion"]
    pins = (DOCKER.parent / "constraints.txt").read_text().splitlines()
    assert f"ray=={release}" in pins


def test_all_that_computes_sees_the_same_volume():
    claims = [found for file in FILES for found in documents(file) if "Claim" in found["kind"]]
    assert {json.dumps(claim) for claim in claims} == {json.dumps(claims[0])}
    assert claims[0]["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in ("Job", "ray head", "ray nodes", "StatefulSet"):
        (container,) = PODS[pod]["containers"]
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "work")
        assert mount["mountPath"] == "/data"
        claim = {"claimName": "rlhf-work"}
        assert {"name": "work", "persistentVolumeClaim": claim} in PODS[pod]["volumes"]


def test_a_server_of_vllm_is_asked_by_its_own_name_and_by_the_cluster_alone():
    service, policy, servers = documents("vllm.yaml")
    text = (DOCKER / "vllm.yaml").read_text()
    (named,) = re.findall(r'RLHF_VLLM_URLS, value: "(.*)"', text)
    name = servers["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None"
    assert servers["spec"]["serviceName"] == service["metadata"]["name"]
    assert named.split(",") == [
        f"http://{name}-{number}.{service['metadata']['name']}:{port}"
        for number in range(servers["spec"]["replicas"])
    ]
    labels = servers["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels == service["spec"]["selector"]
    (source,) = policy["spec"]["ingress"][0]["from"]
    cluster = ray_cluster()["metadata"]["name"]
    assert source == {"podSelector": {"matchLabels": {"ray.io/cluster": cluster}}}
