"""API servers come and go behind one address: another certificate, another process, seconds of
nobody."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trustme
from lightkube import KubeConfig

from rdev.adapters.execution.channels import SUBPROTOCOLS
from rdev.adapters.execution.kubernetes import KubernetesTransport
from rdev.adapters.kubernetes.connection import connect
from rdev.adapters.kubernetes.exec import PodExecs
from rdev.adapters.kubernetes.pods import PodWatch
from rdev.domain.errors import RdevError
from rdev.domain.ids import ProjectId
from tests.adapters.execution.observing import SYSTEM_PATH, until
from tests.adapters.execution.pods import pod
from tests.fakes.api_server import Tls, api_server
from tests.fakes.cuts import CuttingProxy

PROJECT, OTHER = ProjectId("demo"), ProjectId("other")


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], Tls]:
    """Certificates of one authority."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def issue(name: str) -> Tls:
        path = tmp_path / f"{name}.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
        return Tls(authority=str(tmp_path / "ca.pem"), certificate=str(path))

    return issue


async def test_an_api_server_with_another_certificate_takes_over(
    certificate: Callable[[str], Tls],
) -> None:
    async with (
        api_server({"PATH": SYSTEM_PATH}, tls=certificate("one")) as one,
        api_server({"PATH": SYSTEM_PATH}, tls=certificate("two")) as two,
        trio.open_nursery() as nursery,
    ):
        proxy = CuttingProxy(one.port)
        await nursery.start(proxy.run)
        for fake in (one, two):
            fake.put("pods", pod())
        two.put("pods", pod("other-0", OTHER))
        config = KubeConfig.from_dict(one.kubeconfig(proxy.port)).get()
        assert config is not None
        async with connect(config) as api:
            watch = PodWatch(api, changed=lambda _: None)
            nursery.start_soon(watch.run)
            await until(lambda: watch.is_current, "the watch hears")
            execs = PodExecs(api, watch.target_of, subprotocols=SUBPROTOCOLS)
            transport = KubernetesTransport(execs.open)
            async with transport.run(PROJECT, ["echo", "one"]) as streams:
                assert await streams.stdout.receive_some(10) == b"one\n"

            proxy.is_refusing = True
            proxy.cut_all()
            await until(lambda: not watch.is_current, "the loss is noticed")
            proxy.target, proxy.is_refusing = two.port, False
            await until(lambda: watch.pod_of(OTHER) is not None, "the other one is heard")

            async with transport.run(PROJECT, ["echo", "two"]) as streams:
                assert await streams.stdout.receive_some(10) == b"two\n"
            assert one.execs.seen == [["echo", "one"]]
            assert two.execs.seen == [["echo", "two"]]
            watch.stop()
        nursery.cancel_scope.cancel()


async def test_a_server_of_another_authority_is_not_believed(
    certificate: Callable[[str], Tls], tmp_path: Path
) -> None:
    stranger = trustme.CA()
    path = tmp_path / "stranger.pem"
    stranger.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    ours = certificate("ours")
    theirs = Tls(authority=ours.authority, certificate=str(path))
    async with api_server({"PATH": SYSTEM_PATH}, tls=theirs) as fake:
        config = KubeConfig.from_dict(fake.kubeconfig()).get()
        assert config is not None
        async with connect(config) as api:
            watch = PodWatch(api, changed=lambda _: None)
            with pytest.raises(RdevError, match=r"cannot be reached: .*certificate verify failed"):
                await watch.run_once()
        assert fake.requests == []
