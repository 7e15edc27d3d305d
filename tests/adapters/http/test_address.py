"""The client's address: what a trusted proxy says of it, and what nobody else can say."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.adapters.http.address import client_address

PROXIES = [ip_network("10.0.0.0/8"), ip_network("2001:db8:aa::/48")]


def told(peer: str | None, *lines: tuple[str, str]) -> str | None:
    headers = [(name.encode(), value.encode("latin-1")) for name, value in lines]
    return client_address(peer, headers, PROXIES)


def legacy(*values: str) -> str | None:
    return told("10.0.0.1", *[("x-forwarded-for", value) for value in values])


def standard(*values: str) -> str | None:
    return told("10.0.0.1", *[("forwarded", value) for value in values])


@pytest.mark.parametrize(
    ("values", "client"),
    [
        (["9.9.9.9"], "9.9.9.9"),
        (["6.6.6.6, 9.9.9.9"], "9.9.9.9"),
        (["6.6.6.6, 9.9.9.9, 10.0.0.2"], "9.9.9.9"),
        # Several lines are one list, in their order.
        (["6.6.6.6", "9.9.9.9", "10.0.0.2"], "9.9.9.9"),
        (["6.6.6.6,9.9.9.9", "10.0.0.3 , 10.0.0.2"], "9.9.9.9"),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        (["9.9.9.9:1234"], "9.9.9.9"),
        (["2001:db8::7"], "2001:db8::7"),
        (["[2001:db8::7]"], "2001:db8::7"),
        (["[2001:DB8:0::7]:443"], "2001:db8::7"),
        (["9.9.9.9, 2001:db8:aa::5"], "9.9.9.9"),
        (["::ffff:9.9.9.9"], "9.9.9.9"),
        (["6.6.6.6, ::ffff:10.0.0.2"], "6.6.6.6"),
        # What cannot be read ends the walk; nothing further left is looked at.
        (["9.9.9.9, unknown"], "10.0.0.1"),
        (["9.9.9.9, _hidden, 10.0.0.2"], "10.0.0.2"),
        (["9.9.9.9, 1.2.3.4.5"], "10.0.0.1"),
        (["9.9.9.9, fe80::1%eth0"], "10.0.0.1"),
        (["9.9.9.9, 010.0.0.1"], "10.0.0.1"),
        ([""], "10.0.0.1"),
        ([" , ,"], "10.0.0.1"),
    ],
)
def test_x_forwarded_for_is_read_from_the_right(values: list[str], client: str) -> None:
    assert legacy(*values) == client


@pytest.mark.parametrize(
    ("values", "client"),
    [
        (["for=9.9.9.9"], "9.9.9.9"),
        (["For=9.9.9.9;proto=https;by=10.0.0.1"], "9.9.9.9"),
        (["for=6.6.6.6, for=9.9.9.9"], "9.9.9.9"),
        (["for=6.6.6.6", "for=9.9.9.9, for=10.0.0.2"], "9.9.9.9"),
        (['for="[2001:db8::7]:4711"'], "2001:db8::7"),
        (['for="9.9.9.9:80" ; proto=http'], "9.9.9.9"),
        (['proto="a,for=6.6.6.6";for=9.9.9.9'], "9.9.9.9"),
        (['for="\\9.9.9.9"'], "9.9.9.9"),
        (["for=9.9.9.9, for=unknown"], "10.0.0.1"),
        (["for=9.9.9.9, for=_secret, for=10.0.0.2"], "10.0.0.2"),
        (["for=9.9.9.9, proto=https"], "10.0.0.1"),
        (["for=6.6.6.6, broken header, for=9.9.9.9"], "9.9.9.9"),
        # A line that a client broke off does not reach into the next.
        (['for="6.6.6.6', "for=9.9.9.9"], "9.9.9.9"),
        (['for="6.6.6.6', 'for="[2001:db8::7]"'], "2001:db8::7"),
        # Where it cannot be read it cannot be known: no client may pass for its proxy.
        (["for=6.6.6.6, broken header, for=10.0.0.2"], None),
        (['for=6.6.6.6, for="9.9.9.9'], None),
        (['for="6.6.6.6, for="[2001:db8::7]"'], None),
        ([""], "10.0.0.1"),
    ],
)
def test_forwarded_is_read_from_the_right(values: list[str], client: str | None) -> None:
    assert standard(*values) == client


def test_two_headers_that_agree_are_one() -> None:
    lines = [("forwarded", "for=9.9.9.9"), ("x-forwarded-for", "6.6.6.6, 9.9.9.9")]
    assert told("10.0.0.1", *lines) == "9.9.9.9"


def test_of_two_headers_that_disagree_neither_is_believed() -> None:
    lines = [("forwarded", "for=6.6.6.6"), ("x-forwarded-for", "9.9.9.9")]
    assert told("10.0.0.1", *lines) is None


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (None, "127.0.0.1"),
        ("::ffff:8.8.8.8", "8.8.8.8"),
        ("fe80::1%eth0", "fe80::1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
    ],
)
def test_the_peer_is_in_its_one_form(peer: str | None, client: str) -> None:
    assert told(peer) == client


def test_a_proxy_is_trusted_in_either_form() -> None:
    assert told("::ffff:10.0.0.1", ("x-forwarded-for", "9.9.9.9")) == "9.9.9.9"
    assert told("2001:db8:aa::1", ("x-forwarded-for", "9.9.9.9")) == "9.9.9.9"


FOREIGN = st.ip_addresses().filter(lambda a: told(str(a)) == str(a) and not is_proxy(a))
VALUES = st.text(alphabet=st.characters(max_codepoint=255), max_size=60) | st.sampled_from(
    ["for=9.9.9.9", "9.9.9.9", "10.0.0.1, 10.0.0.2", 'for="[::1]"', "for=10.0.0.1,for=9.9.9.9"]
)
LINES = st.lists(
    st.tuples(
        st.sampled_from(["x-forwarded-for", "X-Forwarded-For", "forwarded", "x-real-ip", "host"]),
        VALUES,
    ),
    max_size=6,
)


def is_proxy(address: object) -> bool:
    return any(address in network for network in PROXIES)


@given(FOREIGN, LINES)
def test_nothing_an_untrusted_peer_sends_changes_the_result(
    peer: object, lines: list[tuple[str, str]]
) -> None:
    assert told(str(peer), *lines) == told(str(peer)) == str(peer)


@given(LINES, FOREIGN)
def test_nothing_left_of_what_the_last_proxy_wrote_changes_the_result(
    lines: list[tuple[str, str]], client: object
) -> None:
    """The proxy adds its own line to the header that it writes, and drops the other."""
    sent = [(name, value) for name, value in lines if name.lower() == "x-forwarded-for"]
    assert told("10.0.0.1", *sent, ("x-forwarded-for", str(client))) == str(client)


@given(LINES, FOREIGN)
def test_the_same_holds_for_forwarded(lines: list[tuple[str, str]], client: object) -> None:
    sent = [(name, value) for name, value in lines if name.lower() == "forwarded"]
    node = f'"[{client}]"' if ip_address(str(client)).version == 6 else str(client)
    assert told("10.0.0.1", *sent, ("forwarded", f"for={node}")) == str(client)


@given(st.lists(VALUES, max_size=4), FOREIGN)
def test_on_one_line_a_client_can_hide_itself_but_not_be_another(
    sent: list[str], client: object
) -> None:
    node = f'"[{client}]"' if ip_address(str(client)).version == 6 else str(client)
    line = ",".join([*sent, f"for={node}"])
    assert told("10.0.0.1", ("forwarded", line)) in (str(client), None)
