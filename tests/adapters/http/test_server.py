"""The server as a subsystem: addresses, limits, descriptors, faults of one connection."""

import os
import resource
import shutil
import socket
import ssl
import subprocess

import pytest
import trio
from quart import Blueprint

from rdev.adapters.http.envelope import success
from rdev.adapters.http.server import HttpServer, TlsFiles, listening_socket, raise_descriptor_limit
from rdev.domain.errors import RdevError
from rdev.ports.telemetry import Silence


def routes() -> Blueprint:
    made = Blueprint("made", __name__)

    @made.get("/health")
    async def health():
        return success("up")

    return made


async def test_port_0_works_and_the_bound_address_is_told(serve):
    site = await serve(routes())

    assert site.server.bound[0].startswith("http://127.0.0.1:")
    assert not site.server.bound[0].endswith(":0")
    assert (await site.request("GET", "/health")).json()["data"] == "up"


async def test_a_unix_socket_is_served_and_removed_at_the_end(serve, tmp_path):
    path = str(tmp_path / "rdev.sock")
    site = await serve(routes(), bind=f"unix:{path}")

    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(b"GET /health HTTP/1.0\r\n\r\n")
        assert b"200" in await stream.receive_some(4096)
    site.server.stop()
    await site.done.wait()

    assert not os.path.exists(path)


async def test_a_socket_left_behind_is_replaced_and_a_file_is_not(serve, tmp_path):
    path = tmp_path / "rdev.sock"
    left = trio.socket.socket(trio.socket.AF_UNIX)
    await left.bind(str(path))
    left.close()

    site = await serve(routes(), bind=f"unix:{path}")
    site.server.stop()
    await site.done.wait()
    path.write_text("precious")

    server = HttpServer(app=site.shell, bind=[f"unix:{path}"], grace_s=1, telemetry=Silence())
    with pytest.raises(RdevError, match="in use"):
        await server.run()
    assert path.read_text() == "precious"


async def test_an_address_that_is_taken_fails_before_the_start(serve):
    site = await serve(routes())
    taken = site.server.bound[0].removeprefix("http://")
    base = len(os.listdir("/proc/self/fd"))

    server = HttpServer(app=site.shell, bind=["127.0.0.1:0", taken], grace_s=1, telemetry=Silence())
    with pytest.raises(RdevError, match="in use"):
        await server.run()

    assert len(os.listdir("/proc/self/fd")) == base


def test_the_kernel_gives_up_on_a_peer_that_acknowledges_nothing():
    with listening_socket("127.0.0.1:0", 7.0) as listener:
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                found = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert not listener.get_inheritable()

    assert found == 7000


async def test_stop_before_run_returns_at_once(serve):
    server = HttpServer(app=routes, bind=["127.0.0.1:0"], grace_s=1, telemetry=Silence())
    server.stop()

    with trio.fail_after(10):
        await server.run()


async def test_connections_over_the_limit_are_closed_and_counted(serve, eventually):
    site = await serve(routes(), max_connections=1)

    async with site.connect():
        await eventually(lambda: site.server.open_connections == 1)
        async with site.connect() as over:
            assert await over.closed() == b""
    await eventually(lambda: site.server.open_connections == 0)

    assert site.telemetry.refused == ["connections"]
    assert (await site.request("GET", "/health")).status == 200


async def test_a_fault_of_one_request_ends_no_other_connection(serve, caplog):
    async def app(scope, receive, send):
        raise RuntimeError("outside of everything")

    site = await serve(app=app)

    assert (await site.request("GET", "/health")).status == 500
    assert (await site.request("GET", "/health")).status == 500
    assert "outside of everything" in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\x01\x02\r\n\r\n", b"G" * 100_000, b"GET / HTTP/1.1\r\n\r\n"],
)
async def test_garbage_is_answered_or_closed_and_harms_nobody(serve, garbage):
    site = await serve(routes())

    async with site.connect() as wire:
        await wire.send(garbage)
        assert b" 200 " not in await wire.closed()

    assert (await site.request("GET", "/health")).status == 200


def test_the_descriptor_limit_is_raised_to_the_hard_one():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_tls_is_served_with_both_protocols(serve, nursery, tmp_path, alpn):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    await trio.run_process(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)),
        ],
        stderr=subprocess.DEVNULL,
    )
    site = await serve(routes())
    server = HttpServer(
        app=site.shell,
        bind=["127.0.0.1:0"],
        grace_s=1,
        telemetry=Silence(),
        tls=TlsFiles(cert_file=str(cert), key_file=str(key)),
    )
    await nursery.start(server.run)
    assert server.bound[0].startswith("https://")

    context = ssl.create_default_context(cafile=str(cert))
    context.check_hostname = False
    context.set_alpn_protocols([alpn])
    port = int(server.bound[0].rsplit(":", 1)[1])
    stream = await trio.open_ssl_over_tcp_stream("127.0.0.1", port, ssl_context=context)
    async with stream:
        await stream.do_handshake()
        assert stream.selected_alpn_protocol() == alpn
        if alpn == "http/1.1":
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await stream.receive_some(4096)
        else:
            assert await _h2_status(stream) == b"200"
        await trio.aclose_forcefully(stream)
    server.stop()


async def _h2_status(stream: trio.abc.Stream) -> bytes:
    """The status of `GET /health` over HTTP/2."""
    import h2.config
    import h2.connection
    import h2.events

    config = h2.config.H2Configuration(header_encoding=False)
    client = h2.connection.H2Connection(config)
    client.initiate_connection()
    head = [(":method", "GET"), (":path", "/health"), (":scheme", "https"), (":authority", "x")]
    client.send_headers(1, head, end_stream=True)
    await stream.send_all(client.data_to_send())
    while True:
        for event in client.receive_data(await stream.receive_some(65536)):
            if isinstance(event, h2.events.ResponseReceived):
                return dict(event.headers)[b":status"]
        await stream.send_all(client.data_to_send())
