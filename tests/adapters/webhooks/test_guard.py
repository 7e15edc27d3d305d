"""The guard at connect time: what a name resolves to is judged, and only that is dialled."""

import random
import shutil
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio

from rdev.adapters.webhooks.dialling import SystemResolver
from rdev.domain.sending import SendFault
from rdev.domain.webhook_targets import TargetRules, parse_networks

ATTEMPTS = 1_000
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
# In the place of a public address: the one that the rules open.
OUTSIDE = "127.0.0.2"
INSIDE = "127.0.0.1"
ROOT = Path(__file__).parents[3]


def rules():
    return TargetRules(allow_nets=parse_networks(f"{OUTSIDE}/32"))


@pytest.mark.slow
async def test_1000_attempts_of_a_name_that_is_rebound_reach_nothing_inside(
    receive, sender_of, outgoing, nursery
):
    """Every answer is another one: outside, inside, both, in other forms; the guard asks once."""
    outside = await receive(OK, host=OUTSIDE)
    inside = await listen_inside(nursery, outside.port)
    drawn, asked = random.Random(20_261), Counter()
    answers = [
        [OUTSIDE],
        [INSIDE],
        [OUTSIDE, INSIDE],
        [INSIDE, OUTSIDE],
        ["::ffff:127.0.0.1"],
        ["::1", OUTSIDE],
        ["169.254.169.254"],
        ["64:ff9b::7f00:1"],
        ["0.0.0.0"],
    ]

    async def rebinding(host):
        answer = drawn.choice(answers)
        asked[tuple(answer)] += 1
        return [ip_address(text) for text in answer]

    sender = sender_of(rules=rules(), resolve=rebinding, idle_max=0)
    outcomes = Counter()
    for _ in range(ATTEMPTS):
        outcome = await sender.send(outgoing(f"http://hooks.example.com:{outside.port}/"))
        outcomes[outcome.fault] += 1
        assert inside == []

    assert asked.total() == ATTEMPTS  # resolved once for each attempt
    assert outcomes == {None: asked[OUTSIDE,], SendFault.DENIED: ATTEMPTS - asked[OUTSIDE,]}
    assert outside.connections == asked[OUTSIDE,]


async def listen_inside(nursery, port):
    """Listens where nobody may come; the list grows with each one who does."""
    came = []

    async def handle(stream):
        came.append(stream.socket.getpeername())
        await stream.aclose()

    for host in (INSIDE, "127.0.0.3"):
        await nursery.start(partial(trio.serve_tcp, handle, port, host=host))
    return came


async def test_a_name_that_moves_inside_is_judged_anew_when_its_connection_is_over_age(
    receive, sender_of, outgoing, mock_clock
):
    outside = await receive(OK, host=OUTSIDE)
    answer = [ip_address(OUTSIDE)]

    async def moving(host):
        return answer

    sender = sender_of(rules=rules(), resolve=moving, idle_s=1_000, age_s=1_000)
    url = f"http://hooks.example.com:{outside.port}/"
    assert (await sender.send(outgoing(url))).status == 200
    answer[:] = [ip_address(INSIDE)]
    assert (await sender.send(outgoing(url))).status == 200  # the judged connection

    mock_clock.jump(1_000)

    assert (await sender.send(outgoing(url))).fault is SendFault.DENIED
    assert outside.connections == 1


async def test_a_denied_target_is_told_by_kind_and_never_by_address(sender_of, outgoing):
    for url, kind in [
        ("http://127.0.0.1/", "loopback"),
        ("http://[::1]/", "loopback"),
        ("http://10.20.30.40/", "private"),
        ("http://169.254.169.254/latest", "link-local"),
        ("http://93.184.216.34/", "http is for networks"),
        ("https://93.184.216.34:22/", "port must be"),
    ]:
        outcome = await sender_of(rules=rules()).send(outgoing(url))
        assert (outcome.status, outcome.fault) == (None, SendFault.DENIED)
        assert kind in outcome.detail
        assert "169" not in outcome.detail
        assert "10.20" not in outcome.detail


async def test_the_next_address_is_tried_when_one_does_not_answer(receive, sender_of, outgoing):
    outside = await receive(OK, host=OUTSIDE)

    async def two(host):
        return [ip_address("127.0.0.9"), ip_address(OUTSIDE)]

    opened = TargetRules(allow_nets=parse_networks("127.0.0.0/8"))
    sender = sender_of(rules=opened, resolve=two)

    assert (await sender.send(outgoing(f"http://sink:{outside.port}/"))).status == 200


@pytest.fixture
def silent():
    """A port of loopback whose queue is full: it answers no one, as a lost packet would."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.9", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.mark.slow
async def test_an_address_that_is_silent_has_its_share_of_the_time_only(
    silent, nursery, sender_of, outgoing
):
    host, port = silent
    came = await listen_inside(nursery, port)

    async def two(name):
        return [ip_address(host), ip_address(INSIDE)]

    opened = TargetRules(allow_nets=parse_networks("127.0.0.0/8"))
    sender = sender_of(rules=opened, resolve=two, connect_s=3)

    assert (await sender.send(outgoing(f"http://sink:{port}/"))).fault is SendFault.CUT
    assert len(came) == 1


async def test_a_silent_address_is_given_up_at_the_connect_time(silent, sender_of, outgoing):
    host, port = silent
    opened = TargetRules(allow_nets=parse_networks("127.0.0.0/8"))

    outcome = await sender_of(rules=opened, connect_s=0.3).send(outgoing(f"http://{host}:{port}/"))

    assert outcome.fault is SendFault.TIMEOUT


async def test_a_name_without_an_address_is_a_fault_of_dns(sender_of, outgoing):
    async def none(host):
        return []

    async def unknown(host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for resolve, said in ((none, "has no address"), (unknown, "not known")):
        outcome = await sender_of(resolve=resolve).send(outgoing("https://nobody.example/"))
        assert outcome.fault is SendFault.DNS
        assert said in outcome.detail


async def test_a_resolver_that_hangs_is_cut_at_the_connect_time(sender_of, outgoing):
    async def hanging(host):
        await trio.sleep_forever()

    outcome = await sender_of(resolve=hanging, connect_s=0.1).send(
        outgoing("https://slow.example/")
    )

    assert (outcome.fault, outcome.detail) == (SendFault.TIMEOUT, "no connection within 0.1 s")


async def test_the_system_resolves_names_of_its_files():
    found = await SystemResolver()("localhost")

    assert found
    assert all(address.is_loopback for address in found)
    assert len(found) == len(set(found))


@pytest.mark.slow
def test_a_rebinding_dns_server_reaches_nothing_inside(tmp_path, record_property):
    """The same with the real resolver and the real table: in a network of its own every address of
    the world is this machine's, so nothing but the guard keeps the sender from the inside."""
    program = Path(__file__).parent / "rebinding.py"
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:1\n")
    in_a_network_of_its_own = (
        "ip link set lo up && ip route add local 0.0.0.0/0 dev lo"
        f" && mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
    )
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs unshare and ip")
    unshare = ["unshare", "--map-root-user", "--user", "--net", "--mount", "sh", "-c"]
    tried = subprocess.run([*unshare, in_a_network_of_its_own], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no network of its own: {tried.stderr.decode(errors='replace').strip()}")

    done = subprocess.run(
        [
            *(*unshare, f'{in_a_network_of_its_own} && exec "$0" "$@"'),
            *(sys.executable, program, str(ATTEMPTS)),
        ],
        capture_output=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        text=True,
        timeout=110,
    )

    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    record_property("rebinding", found)
    assert int(found["attempts"]) == ATTEMPTS
    assert int(found["inside"]) == 0
    assert int(found["outside"]) == int(found["accepted"]) > ATTEMPTS // 20
    assert int(found["denied"]) == ATTEMPTS - int(found["accepted"])
    # Without the guard the same attempts do come inside: the trap is one.
    assert int(found["inside unguarded"]) > 0
