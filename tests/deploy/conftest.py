"""What is applied to a cluster, read as strictly as a cluster would, without one."""

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = ("base", "overlays/dev", "overlays/production")
BUILD_DEADLINE_S = 60

# kubectl says which kustomize is in it since 1.24; the one of 1.20 cannot read the overlays.
BUILDERS: tuple[tuple[str, ...], ...] = (("kustomize", "build"), ("kubectl", "kustomize"))

Object = dict[str, Any]


class _Strict(yaml.SafeLoader):
    """YAML as the API server takes it: a key twice is a mistake, `yes` is a text."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> Object:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    assert not twice, f"{node.start_mark}: twice: {twice}"
    assert all(isinstance(key, str) for key in keys), f"{node.start_mark}: keys are texts"
    return {
        key: loader.construct_object(value, deep=True)
        for key, (_, value) in zip(keys, node.value, strict=True)
    }


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str) -> list[Object]:
    """All documents of the text; one that is empty is a mistake."""
    documents = list(yaml.load_all(text, Loader=_Strict))
    assert all(documents), "an empty document"
    return documents


@cache
def build(place: str) -> tuple[Object, ...]:
    """What `kubectl apply -k deploy/k8s/<place>` would send."""
    for argv in BUILDERS:
        if shutil.which(argv[0]) is None or not _is_fit(argv[0]):
            continue
        ended = _run([*argv, str(DEPLOY / "k8s" / place)])
        assert ended.returncode == 0, ended.stderr
        return tuple(read_yaml(ended.stdout))
    pytest.skip("neither `kustomize` nor a `kubectl` of 1.24 or newer is on PATH")


def _is_fit(program: str) -> bool:
    if program != "kubectl":
        return True
    return "kustomizeVersion" in _run([program, "version", "--client", "--output=json"]).stdout


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=BUILD_DEADLINE_S
    )


def one(objects: Sequence[Object], kind: str, name: str = "rdev-api") -> Object:
    """The only object of this kind and name."""
    (found,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def server_of(objects: Sequence[Object]) -> tuple[Object, Object]:
    """The server's pod and its container."""
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


@pytest.fixture(params=KUSTOMIZATIONS)
def objects(request: pytest.FixtureRequest) -> tuple[Object, ...]:
    """The base, and each overlay."""
    return build(request.param)
