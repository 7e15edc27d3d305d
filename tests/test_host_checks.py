"""Each check of the machine finds the fault that is made for it."""

from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rdev import host_checks
from rdev.adapters.telemetry.prometheus import PrometheusTelemetry
from rdev.config import Settings
from rdev.domain.findings import Level
from rdev.host_checks import HostChecks, utc_now


def checks(folder: Path, **settings: object) -> HostChecks:
    return HostChecks(Settings(state_dir=folder, **settings), {}, now=utc_now)


async def test_a_machine_without_faults_is_well(tmp_path: Path):
    about = checks(tmp_path)
    for look in (
        about.settings, about.secret, about.state_folder, about.proxies, about.supervisor,
    ):  # fmt: skip
        finding = await look()
        assert finding.level is Level.OK, (look, finding)


async def test_a_setting_that_does_not_exist_is_told(tmp_path: Path):
    about = HostChecks(Settings(state_dir=tmp_path), {"RDEV_STREAM_MAX": "10"}, now=utc_now)
    finding = await about.settings()
    assert finding.level is Level.WARN
    assert "RDEV_STREAM_MAX" in finding.seen


async def test_a_database_of_many_servers_without_a_shared_secret_is_told(tmp_path: Path):
    about = checks(tmp_path, database_dsn="postgresql://somewhere/rdev")
    assert (await about.secret()).level is Level.WARN


async def test_a_key_that_others_can_read_is_told(tmp_path: Path):
    key = tmp_path / "admin-key"
    key.write_text("x")
    key.chmod(0o644)
    finding = await checks(tmp_path).state_folder()
    assert finding.level is Level.FAIL
    assert "chmod 600" in finding.advice


async def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch):
    # Root may write everywhere; who runs rdev may not.
    monkeypatch.setattr(host_checks.os, "access", lambda *_: False)
    assert (await checks(tmp_path / "new").state_folder()).level is Level.FAIL


@pytest.mark.parametrize(("bound", "level"), [("WARN", Level.WARN), ("FAIL", Level.FAIL)])
async def test_a_full_disk_is_told(tmp_path: Path, monkeypatch, bound: str, level: Level):
    monkeypatch.setattr(host_checks, f"_DISK_{bound}_BYTES", 1 << 62)
    assert (await checks(tmp_path).disk()).level is level


@pytest.mark.parametrize(("hard", "level"), [(4_096, Level.WARN), (20_000, Level.OK)])
async def test_too_few_descriptors_are_told_by_the_limit_that_a_server_raises_itself_to(
    tmp_path: Path, monkeypatch, hard: int, level: Level
):
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda _: (1_024, hard))
    finding = await checks(tmp_path, streams_max=5_000).open_files()
    assert finding.level is level
    assert ("LimitNOFILE" in finding.advice) == (level is Level.WARN)


@pytest.mark.parametrize("name", ["state_dir", "projects_dir"])
async def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path, name: str):
    file = tmp_path / "file"
    file.write_text("x")
    settings = Settings(**{"state_dir": tmp_path, name: file / "below"})
    about = HostChecks(settings, {}, now=utc_now)
    for look in (about.disk, about.server):
        assert (await look()).level is not Level.FAIL
    finding = await about.state_folder()
    assert finding.level is Level.FAIL
    assert f"RDEV_{name.upper()}" in finding.advice
    assert checks(file).database_dsn() is None


@pytest.mark.parametrize(
    ("left_days", "level"), [(-1, Level.FAIL), (7, Level.WARN), (90, Level.OK)]
)
async def test_a_certificate_that_ends_is_told(tmp_path: Path, left_days: int, level: Level):
    certificate, key = _certificate(tmp_path, timedelta(days=left_days))
    about = checks(tmp_path, tls_cert_file=certificate, tls_key_file=key)
    assert (await about.tls()).level is level


async def test_a_key_that_belongs_to_another_certificate_is_told(tmp_path: Path):
    certificate, _ = _certificate(tmp_path, timedelta(days=90))
    (tmp_path / "other").mkdir()
    _, other_key = _certificate(tmp_path / "other", timedelta(days=90))
    about = checks(tmp_path, tls_cert_file=certificate, tls_key_file=other_key)
    assert (await about.tls()).level is Level.FAIL


async def test_a_certificate_that_is_not_valid_yet_is_told(tmp_path: Path):
    certificate, key = _certificate(tmp_path, timedelta(days=90))
    settings = Settings(state_dir=tmp_path, tls_cert_file=certificate, tls_key_file=key)
    before = HostChecks(settings, {}, now=lambda: utc_now() - timedelta(days=400))
    finding = await before.tls()
    assert finding.level is Level.FAIL
    assert "clock" in finding.advice


async def test_a_key_with_a_passphrase_is_told_and_nobody_is_asked(tmp_path: Path):
    certificate, key = _certificate(tmp_path, timedelta(days=90))
    plain = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    Path(key).write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a passphrase"),
        )
    )
    finding = await checks(tmp_path, tls_cert_file=certificate, tls_key_file=key).tls()
    assert finding.level is Level.FAIL
    assert "passphrase" in finding.advice


@pytest.mark.parametrize("text", [b"\xff\xfe", b"no address ][", b""])
async def test_an_address_that_is_none_is_no_server(tmp_path: Path, text: bytes):
    (tmp_path / "address").write_bytes(text)
    assert (await checks(tmp_path).server()).level is Level.SKIPPED


async def test_listening_for_others_without_a_proxy_is_told(tmp_path: Path):
    assert (await checks(tmp_path, bind="0.0.0.0:8080").proxies()).level is Level.WARN
    trusting = checks(tmp_path, bind="0.0.0.0:8080", trusted_proxies="10.0.0.0/8")
    assert (await trusting.proxies()).level is Level.OK


async def test_a_server_that_is_gone_is_no_failure(tmp_path: Path):
    (tmp_path / "address").write_text("127.0.0.1:1\n")
    assert (await checks(tmp_path).server()).level is Level.SKIPPED


@pytest.mark.parametrize(
    ("gauges", "level", "seen", "advice"),
    [
        ({"exec closed nothing": 9, "exec open slow": 0}, Level.OK, "all closed", ""),
        ({"exec half_open due": 2}, Level.OK, "exec half_open: 2 (due)", ""),
        ({"database open failures": 1}, Level.WARN, "database open: 1 (failures)", "503"),
        ({"exec open trial_failed": 12}, Level.WARN, "exec open: 12 (trial_failed)", "projects"),
        ({"webhook open slow": 1}, Level.WARN, "webhook open: 1 (slow)", "endpoints"),
        ({"kubernetes open slow": 1}, Level.WARN, "kubernetes open: 1 (slow)", "API server"),
        ({"newer open slow": 1}, Level.WARN, "newer open: 1 (slow)", "rdev_breakers"),
        ({}, Level.SKIPPED, "tells nothing of them", ""),
    ],
)
async def test_a_breaker_that_is_open_is_told_with_its_reason(
    tmp_path: Path, nursery: trio.Nursery, gauges: dict, level: Level, seen: str, advice: str
):
    telemetry = PrometheusTelemetry()
    tallies: dict[str, dict[tuple[str, ...], int]] = {}
    for gauge, count in gauges.items():
        breaker, *standing = gauge.split()
        tallies.setdefault(breaker, {})[*standing] = count
    for breaker, tally in tallies.items():
        telemetry.watch_breakers(breaker, lambda tally=tally: tally)
    await _serve(tmp_path, nursery, (await telemetry.render(""))[0])

    finding = await checks(tmp_path).breakers()

    assert finding.level is level
    assert seen in finding.seen
    assert advice in finding.advice


async def test_each_kind_of_open_breaker_has_its_advice_once(tmp_path: Path, nursery: trio.Nursery):
    gauge = 'rdev_breakers{{breaker="{}",state="open",reason="{}"}} 1.0'
    shut = ("exec", "slow"), ("exec", "failures"), ("webhook", "slow")
    await _serve(tmp_path, nursery, "\n".join(gauge.format(*one) for one in shut).encode())
    finding = await checks(tmp_path).breakers()
    assert finding.seen == "exec open: 1 (slow), exec open: 1 (failures), webhook open: 1 (slow)"
    assert finding.advice.count("; ") == 3


async def test_without_a_server_there_are_no_breakers(tmp_path: Path):
    assert (await checks(tmp_path).breakers()).level is Level.SKIPPED
    (tmp_path / "address").write_text("127.0.0.1:1\n")
    assert (await checks(tmp_path).breakers()).level is Level.SKIPPED


async def _serve(folder: Path, nursery: trio.Nursery, body: bytes) -> None:
    """What a server there answers to whatever it is asked."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65_536)
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await stream.aclose()

    serve = partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
    (listener,) = await nursery.start(serve)
    port = listener.socket.getsockname()[1]
    (folder / "address").write_text(f"127.0.0.1:{port}\n")


def _certificate(folder: Path, left: timedelta) -> tuple[str, str]:
    """A self-signed one and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "rdev")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now + left)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    certificate_file, key_file = folder / "cert.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(pem))
    key_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(certificate_file), str(key_file)
