"""What lies in deploy/ can be read, names metrics that exist and settings that are known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nitsum.cli.settings import ServeSettings
from nitsum.cli.sources import from_environment, from_file
from nitsum.engine.fake_client import FakeEngineClient
from tests.server.server_kit import Bench, make_checkpoint
from tests.server.test_server_state import CountingEngine

DEPLOY = Path(__file__).parents[2] / "deploy"
YAML = sorted(DEPLOY.rglob("*.yaml"))
METRIC = re.compile(r"\b(?:vllm|nitsum):\w+")


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names that Prometheus knows after scraping a server."""
    bench = Bench(make_checkpoint(tmp_path_factory.mktemp("model") / "tiny"), CountingEngine())
    text = bench.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M))
    assert len(types) > 40
    return set(types) | {
        f"{name}_{part}"
        for name, kind in types.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_it_is_yaml(path: Path):
    assert all(documents(path))


def expressions() -> Iterator[tuple[str, str]]:
    for group in documents(DEPLOY / "prometheus/alerts.yaml")[0]["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    board = json.loads((DEPLOY / "grafana/nitsum.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_metrics_that_are_asked_for_exist(exported: set[str], where: str, expression: str):
    named = set(METRIC.findall(expression))
    assert named, "an expression without a metric of ours"
    assert named <= exported
    for pair in ("()", "[]", "{}"):
        assert expression.count(pair[0]) == expression.count(pair[1])


def test_panels_do_not_overlap():
    board = json.loads((DEPLOY / "grafana/nitsum.json").read_text(encoding="utf-8"))
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        rows = range(at["y"], at["y"] + at["h"])
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in rows}
        assert not covered & cells, panel["title"]
        cells |= covered
    assert max(x for x, _ in cells) < 24


def kubernetes(kind: str) -> Any:
    (found,) = [d for d in documents(DEPLOY / "kubernetes/nitsum.yaml") if d["kind"] == kind]
    return found


def test_the_kubernetes_configuration_is_ours(tmp_path: Path):
    path = tmp_path / "nitsum.yaml"
    path.write_text(kubernetes("ConfigMap")["data"]["nitsum.yaml"])
    known, problems = from_file(ServeSettings, str(path))
    assert problems == []
    assert known["host"].value == "0.0.0.0"


def test_there_is_time_to_drain():
    config = yaml.safe_load(kubernetes("ConfigMap")["data"]["nitsum.yaml"])
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    sleeps_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert sleeps_s + config["shutdown-timeout"] < pod["terminationGracePeriodSeconds"]
    compose = documents(DEPLOY / "docker/compose.yaml")[0]["services"]["nitsum"]
    timeout_s = int(compose["environment"]["NITSUM_SHUTDOWN_TIMEOUT"])
    assert timeout_s < int(compose["stop_grace_period"].removesuffix("s"))


def test_probes_ask_routes_that_exist(tmp_path: Path):
    bench = Bench(make_checkpoint(tmp_path / "tiny"), FakeEngineClient())
    container = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"][0]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert bench.get(container[name]["httpGet"]["path"]).status_code == 200


def test_variables_are_settings():
    compose = documents(DEPLOY / "docker/compose.yaml")[0]["services"]["nitsum"]["environment"]
    container = kubernetes("Deployment")["spec"]["template"]["spec"]["containers"][0]
    names = {*compose, *(entry["name"] for entry in container["env"])}
    image = (DEPLOY / "docker/Dockerfile").read_text(encoding="utf-8")
    names |= set(re.findall(r"(NITSUM_\w+)=", image)) - {"NITSUM_CACHE", "NITSUM_COMPILE"}
    given, problems = from_environment(ServeSettings, dict.fromkeys(names, "x"))
    assert problems == []
    assert len(given) == len(names)


def test_files_that_compose_mounts_exist():
    folder = DEPLOY / "docker"
    services = documents(folder / "compose.yaml")[0]["services"]
    mounts = [volume.split(":")[0] for one in services.values() for volume in one["volumes"]]
    assert [path for path in mounts if path[0] == "." and not (folder / path).exists()] == []


def test_mounts_have_volumes_and_ranks_have_shared_memory():
    pod = kubernetes("Deployment")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claims = {d["metadata"]["name"] for d in documents(DEPLOY / "kubernetes/nitsum.yaml")}
    own = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
    assert own in claims
