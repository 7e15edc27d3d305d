"""Where webhooks may go: spellings of URLs, forms of addresses, and what settings open."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.webhook_targets import (
    TargetRules,
    parse_address,
    parse_networks,
    parse_target,
)

PUBLIC_V4 = "93.184.216.34"
PUBLIC_V6 = "2606:4700:4700::1111"
STRICT = TargetRules()
# Everything the operator can open.
OPEN = TargetRules(allow_nets=parse_networks("0.0.0.0/0, ::/0"))

# (address, kind, whether RDEV_WEBHOOK_ALLOW_NETS can open it)
DENIED = [
    ("0.0.0.0", "unspecified", False),
    ("0.1.2.3", "unspecified", False),
    ("::", "unspecified", False),
    ("127.0.0.1", "loopback", True),
    ("127.255.255.254", "loopback", True),
    ("::1", "loopback", True),
    ("10.0.0.0", "private", True),
    ("10.255.255.255", "private", True),
    ("172.16.0.1", "private", True),
    ("172.31.255.255", "private", True),
    ("192.168.0.1", "private", True),
    ("192.168.255.255", "private", True),
    ("fc00::1", "private", True),
    ("fd00:ec2::254", "private", True),  # metadata of AWS
    ("fd20:ce::254", "private", True),  # metadata of Google
    ("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "private", True),
    ("fec0::1", "private", True),
    ("169.254.169.254", "link-local", True),  # metadata of most clouds
    ("169.254.0.1", "link-local", True),
    ("fe80::1", "link-local", True),
    ("febf::1", "link-local", True),
    ("fe80::1%eth0", "of one link", False),
    ("2606:4700::1%1", "of one link", False),
    ("100.64.0.1", "CGNAT", True),
    ("100.100.100.200", "CGNAT", True),  # metadata of Alibaba
    ("100.127.255.255", "CGNAT", True),
    ("224.0.0.1", "multicast", False),
    ("239.255.255.255", "multicast", False),
    ("ff02::1", "multicast", False),
    ("ff0e::1", "multicast", False),
    ("255.255.255.255", "broadcast", False),
    ("240.0.0.1", "reserved", True),
    ("254.255.255.255", "reserved", True),
    ("192.0.2.1", "documentation", True),
    ("198.51.100.1", "documentation", True),
    ("203.0.113.1", "documentation", True),
    ("2001:db8::1", "documentation", True),
    ("3fff::1", "documentation", True),
    ("198.18.0.1", "benchmarks", True),
    ("198.19.255.255", "benchmarks", True),
    ("2001:2::1", "benchmarks", True),
    ("192.0.0.1", "protocols", True),
    ("192.0.0.192", "protocols", True),  # metadata of Oracle
    ("2001:10::1", "protocols", True),
    ("2001:20::1", "protocols", True),
    ("192.88.99.1", "6to4", True),
    ("192.31.196.1", "AS112", True),
    ("192.52.193.1", "AMT", True),
    ("192.175.48.1", "AS112", True),
    ("2620:4f:8000::1", "AS112", True),
    ("168.63.129.16", "cloud", True),  # Azure's host, on a public address
    ("::ffff:10.0.0.1", "mapped", False),
    ("::ffff:127.0.0.1", "mapped", False),
    ("::ffff:a9fe:a9fe", "mapped", False),
    ("::ffff:8.8.8.8", "mapped", False),
    ("::ffff:0:8.8.8.8", "not one of the global", True),
    ("::ffff:0:10.0.0.1", "not one of the global", True),
    ("::127.0.0.1", "not one of the global", True),
    ("::8.8.8.8", "not one of the global", True),
    ("64:ff9b::a9fe:a9fe", "NAT64", True),
    ("64:ff9b::8.8.8.8", "NAT64", True),
    ("64:ff9b:1::1", "NAT64", False),  # carries 0.0.0.1
    ("2002:7f00:1::", "6to4", True),
    ("2002:a00:1::1", "6to4", True),
    ("2002:808:808::1", "6to4", True),
    ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "Teredo", True),
    ("2001::1", "Teredo", True),
    ("2001::", "Teredo", False),  # carries 255.255.255.255, inverted
    ("2606:4700::5efe:a00:1", "carried", True),  # ISATAP
    ("2606:4700::200:5efe:808:808", "carried", True),
    ("100::1", "not one of the global", True),  # discard only
    ("5f00::1", "not one of the global", True),  # segment routing
    ("4000::1", "not one of the global", True),
    ("1::", "not one of the global", True),
]
ALLOWED = [
    "1.0.0.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "168.63.129.17",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    PUBLIC_V4,
    PUBLIC_V6,
    "2001:200::1",
    "2001:4860:4860::8888",
    "2a00:1450:4001:81b::200e",
    "3ffe::1",
]


def refused(call, *arguments):
    with pytest.raises(RdevError) as caught:
        call(*arguments)
    assert caught.value.code == ErrorCode.BAD_REQUEST
    assert [fault.pointer for fault in caught.value.faults] == ["/url"]
    return caught.value.message


def test_more_than_sixty_forms_of_addresses_are_in_the_table() -> None:
    assert len({address for address, _, _ in DENIED}) >= 60


@pytest.mark.parametrize(("address", "kind", "openable"), DENIED)
def test_an_address_that_is_not_everybodys_is_refused(address, kind, openable) -> None:
    assert kind in (STRICT.refusal(parse_address(address)) or "allowed")
    assert (OPEN.refusal(parse_address(address)) is None) == openable


@pytest.mark.parametrize("address", ALLOWED)
def test_a_public_address_is_allowed_up_to_the_edge_of_each_block(address) -> None:
    assert STRICT.refusal(ip_address(address)) is None


@given(st.ip_addresses())
def test_what_python_calls_private_or_multicast_is_refused_too(address) -> None:
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert STRICT.refusal(address) is not None


@given(st.ip_addresses(v=4))
@example(IPv4Address("0.0.0.1"))
def test_what_carries_an_inner_address_is_refused_unless_both_are_open(inner) -> None:
    number = int(inner)
    carriers = [
        IPv6Address((0x64FF9B << 96) | number),
        IPv6Address((0x2002 << 112) | (number << 80) | 1),
        IPv6Address((0x2001 << 112) | (~number & 0xFFFFFFFF)),
        IPv6Address((0x26064700 << 96) | (0x5EFE << 32) | number),
        # (`::` and `::1` are addresses of their own.)
        IPv6Address(max(2, number)),
    ]
    only_v6 = TargetRules(allow_nets=parse_networks("::/0"))
    for carrier in carriers:
        assert STRICT.refusal(carrier) is not None
        if STRICT.refusal(inner) is not None:
            assert only_v6.refusal(carrier) is not None, carrier


SPELLINGS = [
    # other spellings of 127.0.0.1 that some resolver or library reads
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7F000001/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://0x7f.0.0.1/",
    "https://0x7f.1/",
    "https://127.1/",
    "https://127.0.1/",
    "https://127.0.0.1./",
    "https://127.0.0.01/",
    "https://127.0.0.0x1/",
    "https://127.0.0.1.0x/",
    "https://0/",
    "https://256.256.256.256/",
    "https://1.2.3.4.5/",
    "https://１２７.0.0.1/",
    "https://①②⑦.0.0.1/",
    "https://127。0。0。1/",
    "https://%31%32%37.0.0.1/",
    # IPv6 in other forms
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[::0001]/",
    "https://[2606:4700:4700:0::1111]/",
    "https://[fe80::1%25eth0]/",
    "https://[fe80::1%eth0]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[127.0.0.1]/",
    "https://[v1.fe80]/",
    "https://[]/",
    "https://[::1/",
    "https://::1/",
    # names
    "https:///",
    "https://",
    "https://?x",
    "https://hooks.example.com./",
    "https://hooks..example.com/",
    "https://.example.com/",
    "https://-a.example.com/",
    "https://a_b.example.com/",
    "https://bücher.example/",
    "https://ⓔxample.com/",
    "https://exam%70le.com/",
    "https://exa mple.com/",
    f"https://{'a' * 64}.example.com/",
    f"https://{'a.' * 126}ab/",
    # who, where, how
    "https://user@example.com/",
    "https://user:secret@example.com/",
    "https://@example.com/",
    "https://example.com@10.0.0.1/",
    "https://example.com\\@10.0.0.1/",
    "https://example.com\\.evil.org/",
    "https://example.com#@10.0.0.1/",
    "https://example.com/#fragment",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "//example.com/",
    "example.com/",
    "https:example.com/",
    "https:/example.com/",
    " https://example.com/",
    "https://example.com/\r\nX-Evil: 1",
    "https://example.com\t/",
    "https://example.com/a b",
    "https://example.com/%zz",
    "https://example.com/ä",
    "https://example.com/\x00",
    "https://example.com:/",
    "https://example.com:0/",
    "https://example.com:0443/",
    "https://example.com:65536/",
    "https://example.com:-1/",
    "https://example.com:４４３/",
    "https://example.com:443:443/",
    f"https://example.com/{'a' * 2_048}",
]


@pytest.mark.parametrize("url", SPELLINGS)
def test_another_spelling_is_refused_even_where_every_network_is_open(url) -> None:
    def both():
        OPEN.check(parse_target(url))

    refused(both)


@pytest.mark.parametrize(
    ("url", "canonical", "authority"),
    [
        ("https://hooks.example.com", "https://hooks.example.com/", "hooks.example.com"),
        ("HTTPS://Hooks.Example.COM:443/A?b=c", "https://hooks.example.com/A?b=c", None),
        ("https://example.com:8443/x", "https://example.com:8443/x", "example.com:8443"),
        ("https://example.com?x=1", "https://example.com/?x=1", None),
        ("http://sink:80/", "http://sink/", "sink"),
        ("https://xn--bcher-kva.example/%C3%A4", "https://xn--bcher-kva.example/%C3%A4", None),
        (f"https://[{PUBLIC_V6.upper()}]/", f"https://[{PUBLIC_V6}]/", f"[{PUBLIC_V6}]"),
        (f"https://{PUBLIC_V4}:8443/", f"https://{PUBLIC_V4}:8443/", f"{PUBLIC_V4}:8443"),
        ("https://1.example.com/;a=b,(c)'!*$&+@:~", None, None),
    ],
)
def test_a_url_has_one_spelling(url, canonical, authority) -> None:
    target = parse_target(url)

    assert target.url == (canonical or url)
    assert parse_target(target.url) == target
    if authority is not None:
        assert target.authority == authority


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://example.com/", "http is for networks"),
        ("https://example.com:22/", "one of 443, 8443"),
        ("https://10.0.0.1/", "address is private"),
        ("https://[::1]/", "address is loopback"),
        (f"http://{PUBLIC_V4}/", "http is for networks"),
        (f"https://{PUBLIC_V4}:80/", "one of 443, 8443"),
    ],
)
def test_what_a_url_alone_tells_is_refused_before_a_name_is_resolved(url, said) -> None:
    assert said in refused(STRICT.check, parse_target(url))


def test_a_name_passes_the_check_of_its_url_and_is_judged_by_its_addresses() -> None:
    target = parse_target("https://hooks.example.com/")
    STRICT.check(target)

    assert STRICT.judge(target, [ip_address(PUBLIC_V4), ip_address(PUBLIC_V6)]) is None
    assert STRICT.judge(target, [ip_address("10.0.0.7")]) == "the host's address is private"
    with pytest.raises(ValueError, match="nothing to judge"):
        STRICT.judge(target, [])


def test_one_address_inside_refuses_all_of_a_name() -> None:
    target = parse_target("https://hooks.example.com/")

    mixed = [ip_address(PUBLIC_V4), ip_address("169.254.169.254")]
    assert STRICT.judge(target, mixed) == "the host's address is link-local"
    assert "169" not in (STRICT.judge(target, mixed) or "")


def test_allowed_networks_open_any_port_and_http_for_what_is_in_them_alone() -> None:
    rules = TargetRules(allow_nets=parse_networks("10.1.0.0/16,fd00::/8"))
    plain = parse_target("http://sink.jobs.svc:9000/")
    rules.check(plain)

    assert rules.judge(plain, [ip_address("10.1.2.3"), ip_address("fd00::1")]) is None
    assert rules.judge(plain, [ip_address("10.2.0.1")]) == "the host's address is private"
    assert "http is for" in (rules.judge(plain, [ip_address(PUBLIC_V4)]) or "")
    mixed = [ip_address("10.1.2.3"), ip_address(PUBLIC_V4)]
    assert "http is for" in (rules.judge(plain, mixed) or "")
    tls = parse_target("https://sink.jobs.svc:9000/")
    assert "port must be" in (rules.judge(tls, mixed) or "")
    assert rules.judge(parse_target("https://sink.jobs.svc/"), mixed) is None


def test_networks_of_the_cluster_are_closed_though_they_look_public() -> None:
    rules = TargetRules(
        deny_nets=parse_networks("93.184.0.0/16"), allow_nets=parse_networks("93.184.216.34/32")
    )

    assert "DENY_NETS" in (rules.refusal(IPv4Address("93.184.1.1")) or "")
    assert rules.refusal(IPv4Address(PUBLIC_V4)) is None  # opened on purpose goes first
    carried = TargetRules(deny_nets=rules.deny_nets, allow_nets=parse_networks("64:ff9b::/96"))
    assert "DENY_NETS" in (carried.refusal(IPv6Address("64:ff9b::5db8:101")) or "")


def test_networks_are_read_from_a_list_with_commas() -> None:
    assert parse_networks("") == ()
    assert parse_networks(" 10.0.0.0/8 ,::1,") == (ip_network("10.0.0.0/8"), ip_network("::1/128"))
    for text in ("10.0.0.1/8", "10.0.0.0/33", "example.com"):
        with pytest.raises(ValueError, match=r"."):
            parse_networks(text)
