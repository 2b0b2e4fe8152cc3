"""Files for clusters: Ray's launcher and KubeRay take them, they agree with one another, the docs can be followed."""

import copy
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema

from raygrow.runtime.serve_config import read_config
from tests.processes import run_script

ROOT = Path(__file__).parents[1]
SHARED = "/mnt/raygrow"
TEXT = (ROOT / "cluster.yaml").read_text()
CLUSTER = yaml.safe_load(TEXT)
_, _, _COMMENT = TEXT.partition("# Other providers:")
OTHERS = yaml.safe_load("\n".join(line[2:] for line in _COMMENT.splitlines()[1:]))
KUBERAY = {
    name: yaml.safe_load((ROOT / f"kuberay/{name}.yaml").read_text())
    for name in ("storage", "raycluster", "rayjob", "rayservice")
}
SERVE = yaml.safe_load((ROOT / "serve.yaml").read_text())
DOCS = (ROOT / "docs/cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines()]
INLINE = re.findall(r"`((?:ray|raygrow) [^`]+)`", DOCS)
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)

# The fields of ray.io/v1 and of pods that the files may use, as KubeRay's CRDs have them: a type for a plain value, a
# dict for an object, a list of one for a list of them, `dict` and `list` for any.
CONTAINER = {
    "name": str,
    "image": str,
    "env": list,
    "ports": [{"containerPort": int, "name": str}],
    "resources": {"requests": dict, "limits": dict},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "containers": [CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "securityContext": {"fsGroup": int},
    "nodeSelector": dict,
}
RAY_CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"upscalingMode": str, "idleTimeoutSeconds": int},
    "headGroupSpec": {"rayStartParams": dict, "template": {"spec": POD}},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": {"spec": POD},
        }
    ],
}
RAY_JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "rayClusterSpec": RAY_CLUSTER,
}
RAY_SERVICE = {
    "upgradeStrategy": {"type": str},
    "serveConfigV2": str,
    "rayClusterConfig": RAY_CLUSTER,
}
CLAIM = {"accessModes": list, "storageClassName": str, "resources": {"requests": dict}}
KINDS = {
    "storage": ("v1", "PersistentVolumeClaim", CLAIM),
    "raycluster": ("ray.io/v1", "RayCluster", RAY_CLUSTER),
    "rayjob": ("ray.io/v1", "RayJob", RAY_JOB),
    "rayservice": ("ray.io/v1", "RayService", RAY_SERVICE),
}


def unknown(value: Any, known: Any, path: str = "spec") -> list[str]:
    """Paths of the fields that are unknown or of another type."""
    if isinstance(known, dict) and isinstance(value, dict):
        strange = [f"{path}.{key}" for key in value if key not in known]
        return strange + [
            found for key in value if key in known for found in unknown(value[key], known[key], f"{path}.{key}")
        ]
    if isinstance(known, list) and isinstance(value, list):
        return [found for i, item in enumerate(value) for found in unknown(item, known[0], f"{path}[{i}]")]
    return [] if isinstance(known, type) and type(value) is known else [path]


def settings_of(provider: str) -> dict[str, Any]:
    """The cluster's settings, with what the comment says about a provider."""
    merged = copy.deepcopy({**CLUSTER, **OTHERS.get(provider, {})})
    return {key: value for key, value in merged.items() if value is not None}


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure", "local"])
def test_the_launcher_takes_every_provider(provider: str) -> None:
    settings = settings_of(provider)
    prepared = prepare_config(copy.deepcopy(settings))
    validate_config(prepared)
    assert prepared["provider"]["type"] == provider
    assert any(SHARED in option for option in prepared["docker"]["run_options"])
    if provider == "local":
        head = prepared["head_start_ray_commands"][-1]
        assert "--num-cpus=0" in head
        assert """--resources='{"driver":1}'""" in head
        return
    types = prepared["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "driver": 1}
    assert prepared["head_node_type"] == "head"
    assert types["gpu"]["resources"].get("GPU", 1) >= 1
    assert 1 <= types["gpu"]["min_workers"] < types["gpu"]["max_workers"] <= prepared["max_workers"]
    assert any(SHARED in command and "mount" in command for command in prepared["initialization_commands"])


def test_only_workers_can_be_taken_away() -> None:
    types = CLUSTER["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu"]["node_config"]["ImageId"] == types["head"]["node_config"]["ImageId"]


def test_nodes_install_what_the_checkout_says() -> None:
    assert all((ROOT / local).exists() for local in CLUSTER["file_mounts"].values())
    assert all(remote == f"~/raygrow/{local}" for remote, local in CLUSTER["file_mounts"].items())
    torch, raygrow = CLUSTER["setup_commands"]
    assert "^torch==" in torch
    assert re.search(r"-c ~/raygrow/constraints.txt -e ~/raygrow$", raygrow)


def test_one_version_of_ray_and_python_everywhere() -> None:
    image = CLUSTER["docker"]["image"]
    assert image == f"rayproject/ray:{PINNED['ray']}-py311-gpu"
    assert f"FROM {image}\n" in (ROOT / "kuberay/Dockerfile").read_text()
    assert KUBERAY["raycluster"]["spec"]["rayVersion"] == PINNED["ray"]
    assert 'pythonVersion = "3.11"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", KINDS)
def test_kuberay_knows_every_field(name: str) -> None:
    version, kind, known = KINDS[name]
    document = KUBERAY[name]
    assert (document["apiVersion"], document["kind"]) == (version, kind)
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", document["metadata"]["name"])
    assert not unknown(document["spec"], known)


def test_an_unknown_field_is_found() -> None:
    spec = copy.deepcopy(KUBERAY["rayjob"]["spec"])
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resource"] = {}
    spec["backoffLimit"] = "3"
    assert unknown(spec, RAY_JOB) == [
        "spec.backoffLimit",
        "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].resource",
    ]


def test_kuberay_clusters_are_like_the_launcher_s() -> None:
    spec = KUBERAY["raycluster"]["spec"]
    assert spec == KUBERAY["rayjob"]["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    # KubeRay pastes the value into a shell command
    start = spec["headGroupSpec"]["rayStartParams"]
    assert start["num-cpus"] == "0"
    assert shlex.split(start["resources"]) == ['{"driver": 1}']
    workers = spec["workerGroupSpecs"][0]
    assert 1 <= workers["minReplicas"] <= workers["replicas"] < workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_service_s_cluster_is_like_the_others() -> None:
    spec = copy.deepcopy(KUBERAY["rayservice"]["spec"]["rayClusterConfig"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (key,) = container.pop("env")
        assert key["name"] == "RAYGROW_API_KEY"
    (port,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("ports")
    assert port == {"containerPort": SERVE["http_options"]["port"], "name": "serve"}
    other = copy.deepcopy(KUBERAY["raycluster"]["spec"])
    del other["headGroupSpec"]["rayStartParams"]["resources"]  # a driver's, which a service has not
    assert spec == other


def test_serve_takes_both_files() -> None:
    inside = yaml.safe_load(KUBERAY["rayservice"]["spec"]["serveConfigV2"])
    assert inside["applications"] == SERVE["applications"]
    assert (SERVE["http_options"]["host"], inside["http_options"]["host"]) == ("127.0.0.1", "0.0.0.0")
    for tree in (SERVE, inside):
        deployed = ServeDeploySchema.model_validate(tree)
        (app,) = deployed.applications
        assert app.import_path == "raygrow.runtime.serve:build"
        assert read_config(app.args).llm_configs[0].model_loading_config.model_source.startswith(SHARED)


@pytest.mark.parametrize("name", ["raycluster", "rayservice"])
def test_pods_share_one_folder(name: str) -> None:
    storage, spec = KUBERAY["storage"], KUBERAY[name]["spec"]
    spec = spec.get("rayClusterConfig", spec)
    assert storage["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (volume,), (container,) = pod["volumes"], pod["containers"]
        assert volume["persistentVolumeClaim"]["claimName"] == storage["metadata"]["name"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": SHARED}]
        assert container["image"] in DOCS


def test_jobs_bring_no_packages_along() -> None:
    assert list(yaml.safe_load(KUBERAY["rayjob"]["spec"]["runtimeEnvYAML"])) == ["env_vars"]
    assert not re.search(r"runtime-env[^`]*\b(pip|conda|uv)\b", DOCS)


def ray_words(command: str) -> list[str]:
    """The words of a `ray` command, without the command that it runs on the cluster."""
    words = shlex.split(command)
    return words[1 : words.index("--") if "--" in words else None]


@pytest.mark.parametrize("command", sorted({c for c in [*COMMANDS, *INLINE] if c.startswith("ray ")}))
def test_ray_has_the_commands_of_the_docs(command: str) -> None:
    words = ray_words(command)
    name = words[: 2 if words[0] == "job" else 1]
    shown = CliRunner().invoke(ray_cli, [*name, "--help"])
    assert shown.exit_code == 0, shown.output
    for option in words:
        assert not option.startswith("--") or option in shown.output, option


ON_CLUSTER = [shlex.split(c.split(" -- ", 1)[1]) for c in COMMANDS if " -- python " in c and "dry_run" not in c]


@pytest.mark.parametrize("words", ON_CLUSTER, ids=shlex.join)
def test_jobs_of_the_docs_compose(words: list[str], tmp_path: Path) -> None:
    for word in words:
        if word.startswith(("data.path=", "storage_path=")):
            assert word.partition("=")[2].startswith((SHARED, "$PWD/")), "a job's paths are absolute"
    job, *rest = words[1:]
    placed = [word.replace("$PWD", str(tmp_path)) for word in rest]
    done = run_script(ROOT / job, [*placed, "dry_run=true"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_kuberay_job_is_the_search_of_the_docs() -> None:
    words = shlex.split(KUBERAY["rayjob"]["spec"]["entrypoint"].replace("/home/ray/raygrow/", ""))
    assert any(set(words) <= set(job) for job in ON_CLUSTER)


def test_files_and_links_of_the_docs_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", DOCS)
    assert {"../cluster.yaml", "../kuberay/rayjob.yaml"} <= set(links)
    assert all((ROOT / "docs" / link).exists() for link in links)
    for command in COMMANDS:
        for word in shlex.split(command):
            if word.endswith((".yaml", "Dockerfile")):
                assert (ROOT / word).exists(), command
    assert KUBERAY["raycluster"]["metadata"]["name"] + "-head-svc" in DOCS
    assert f"job/{KUBERAY['rayjob']['metadata']['name']}" in DOCS


def test_a_job_carries_the_code_and_little_else(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    with zipfile.ZipFile(package) as opened:
        names = opened.namelist()
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"jobs", "raygrow", "tune_spaces"}
    assert "raygrow/conf/plan/gstack.yaml" in names
    assert package.stat().st_size < 2 * 2**20
