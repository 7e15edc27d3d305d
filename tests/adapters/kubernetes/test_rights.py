"""What an account may do is asked of the API server."""

from pathlib import Path

import pytest
import yaml
from lightkube import KubeConfig

from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.rights import Right, missing_rights
from rdev.cli.doctor import RIGHTS
from rdev.domain.errors import RdevError
from tests.fakes.api_server import NAMESPACE, Fault, api_server

ROOT = Path(__file__).parents[3]


def test_what_the_manifest_grants_is_what_is_asked_about():
    granted = set()
    for document in yaml.safe_load_all((ROOT / "deploy/k8s/base/access.yaml").read_text()):
        for rule in document.get("rules", ()):
            granted |= {(verb, name) for verb in rule["verbs"] for name in rule["resources"]}
    assert {(right.verb, right.resource) for right in RIGHTS} == granted


async def test_what_is_refused_is_named():
    async with api_server({"PATH": "/usr/bin:/bin"}) as fake:
        fake.refused_rights = {("create", "pods/exec"), ("get", "secrets")}
        config = KubeConfig.from_dict(fake.kubeconfig()).get()
        async with connect(config, NAMESPACE) as api:
            missing = await missing_rights(api, RIGHTS)
    assert missing == [Right(verb="create", resource="pods/exec")]
    assert str(missing[0]) == "create pods/exec"


async def test_an_api_server_that_answers_no_reviews_is_an_error():
    async with api_server({"PATH": "/usr/bin:/bin"}) as fake:
        path_end = "/selfsubjectaccessreviews"
        fake.faults.append(Fault(status=503, method="POST", path_end=path_end, times=100))
        config = KubeConfig.from_dict(fake.kubeconfig()).get()
        async with connect(config, NAMESPACE) as api:
            with pytest.raises(RdevError):
                await missing_rights(api, RIGHTS)
