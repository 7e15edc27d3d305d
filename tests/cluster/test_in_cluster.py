"""The manifests as they run: migration, server, its account, projects, a new version."""

from pathlib import Path

import pytest
import trio

from tests.app.server import open_api, output_of
from tests.cluster.in_cluster import end_servers, forwarded, runnable, secret, server_of
from tests.cluster.ledger import Entry, Ledger, wrong_bytes
from tests.cluster.real import NAMESPACE, RealCluster, admin, kubectl
from tests.cluster.test_deploy import (
    applied,
    as_known,
    audited,
    made_by_template,
    read_example,
    right,
)
from tests.cluster.test_faults import SLOW, SLOW_SEEN
from tests.deploy.conftest import build


@pytest.mark.timeout(600)
async def test_the_manifests_run_and_a_new_version_takes_over(
    tmp_path: Path, cluster: RealCluster, database_dsn: str, ledger: Ledger
) -> None:
    """In a pod, with the token that is mounted and nothing but the role."""
    admin()
    (example,) = read_example()
    values, key = secret(example, database_dsn)
    objects = [values, *runnable(await as_known(build("overlays/dev")))]
    before = len(audited())
    await cluster.add_pod()
    async with forwarded(database_dsn), applied(objects):
        try:
            await kubectl(
                *("wait", "-n", NAMESPACE, "--for=condition=complete", "job/rdev-migrate"),
                "--timeout=80s",
            )
            one = await server_of(tmp_path, key)
            async with open_api(one) as api:
                await api.project()
                await made_by_template(api)
                command = await api.submit(SLOW)
                await api.running(command)
            await kubectl("rollout", "restart", "-n", NAMESPACE, "deployment/rdev-api")
            other = await server_of(tmp_path, key)
            assert other.url != one.url
            async with open_api(other) as api:
                events = await api.events(command)
                ended = await api.ended(command)
            log = await kubectl("logs", "-n", NAMESPACE, "deployment/rdev-api")
        finally:
            with trio.CancelScope(shield=True):  # shielded: the next test counts requests
                await kubectl("delete", "-n", NAMESPACE, "deployment/rdev-api", "job/rdev-migrate")
                await end_servers()
    wrong = sum(
        wrong_bytes(output_of(events, stream), SLOW_SEEN) for stream in ("stdout", "stderr")
    )
    ledger.add(
        Entry(
            fault="rollout of a new server in the cluster",
            wrong_bytes=wrong,
            false_successes=int(ended["status"] == "succeeded"),
            outcome=str(ended["status"]),
        )
    )
    assert wrong == 0
    assert (ended["status"], ended["exit_code"], ended["attempt"]) == ("failed", 3, 1)
    assert '"level":"error"' not in log
    asked = [entry for entry in audited()[before:] if "objectRef" in entry]
    assert [right(entry) for entry in asked if entry["responseStatus"]["code"] == 403] == []
    assert ("pods/exec", "get") in {right(entry) for entry in asked}
