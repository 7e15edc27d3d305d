"""The bytes of an entry, its hash, and what a broken chain shows."""

from dataclasses import replace
from datetime import UTC, date, datetime

from rdev.domain.audit import Entry
from rdev.domain.audit_chain import (
    GENESIS,
    ORIGIN,
    FaultKind,
    Link,
    canonical,
    check_links,
    next_hash,
)

ENTRY = Entry(
    day=date(2026, 11, 22),
    id=7,
    xid=1234,
    at=datetime(2026, 11, 22, 18, 0, 0, 123456, tzinfo=UTC),
    actor="key_1",
    actor_name="Zoë",
    ip=None,
    request_id="req-1",
    action="key.created",
    target="key_2",
    project=None,
    outcome="ok",
    detail={"scopes": ["admin"], "b": 1, "aa": 'é"\n'},
)
# Written down once: what was sealed must verify for as long as it is kept.
GOLDEN = bytes.fromhex(
    "01" "0000000d"
    "0000043a00000004" "0000265e"
    "0000001400000008" "0000000000000007"
    "000013cd00000008" "00000000000004d2"
    "000004a000000008" "000303e003b8aa40"
    "0000001900000005" "6b65795f31"
    "0000001900000004" "5a6fc3ab"
    "00000019ffffffff"
    "0000001900000005" "7265712d31"
    "000000190000000b" "6b65792e63726561746564"
    "0000001900000005" "6b65795f32"
    "00000019ffffffff"
    "0000001900000002" "6f6b"
    "00000eda0000002e"
    "017b2262223a20312c20226161223a2022c3a95c225c6e222c202273636f706573223a205b2261646d696e225d7d"
)  # fmt: skip


def chain(entries: list[Entry]) -> list[Link]:
    links, last = [], GENESIS
    for seq, entry in enumerate(entries, start=1):
        content = canonical(entry)
        last = next_hash(last, content)
        links.append(Link(seq, last, entry.day, content))
    return links


LINKS = chain([replace(ENTRY, id=number, xid=100 + number) for number in range(1, 6)])


def fault_of(links: list[Link]) -> tuple[FaultKind, int] | None:
    fault = check_links(ORIGIN, links, None).fault
    return None if fault is None else (fault.kind, fault.seq)


def test_the_bytes_of_an_entry_are_these_for_ever():
    assert canonical(ENTRY).hex() == GOLDEN.hex()


def test_every_field_is_in_the_bytes():
    changed = {
        "day": date(2026, 11, 23),
        "id": 8,
        "xid": 1235,
        "at": datetime(2026, 11, 22, 18, tzinfo=UTC),
        "actor": "key_3",
        "actor_name": "Zoe",
        "ip": "10.0.0.1",
        "request_id": None,
        "action": "key.revoked",
        "target": "key_3",
        "project": "demo",
        "outcome": "denied",
        "detail": {},
    }
    for name, value in changed.items():
        assert canonical(replace(ENTRY, **{name: value})) != canonical(ENTRY), name
    assert changed.keys() == {*Entry.__slots__}


def test_text_cannot_move_from_one_field_to_the_next():
    one = replace(ENTRY, actor="ab", actor_name="c")
    other = replace(ENTRY, actor="a", actor_name="bc")
    assert canonical(one) != canonical(other)


def test_an_untouched_chain_holds():
    verdict = check_links(ORIGIN, LINKS, None)
    assert (verdict.fault, verdict.checked, verdict.last.hash) == (None, 5, LINKS[-1].hash)


def test_an_edited_entry_is_named():
    edited = replace(LINKS[2], content=canonical(replace(ENTRY, id=3, xid=103, actor="other")))
    assert fault_of([*LINKS[:2], edited, *LINKS[3:]]) == (FaultKind.EDITED, 3)


def test_an_entry_that_is_gone_is_named():
    assert fault_of([*LINKS[:2], replace(LINKS[2], content=None)]) == (FaultKind.DELETED, 3)


def test_a_seal_that_is_gone_is_named():
    assert fault_of([*LINKS[:2], *LINKS[3:]]) == (FaultKind.SEAL_MISSING, 3)


def test_entries_that_changed_places_are_named():
    one, two = LINKS[2], LINKS[3]
    swapped = [replace(one, content=two.content), replace(two, content=one.content)]
    assert fault_of([*LINKS[:2], *swapped, LINKS[4]]) == (FaultKind.REORDERED, 3)


def test_two_that_changed_places_over_the_end_of_a_batch_are_seen_too():
    one, two = LINKS[3], LINKS[4]
    first = [*LINKS[:3], replace(one, content=two.content)]
    fault = check_links(ORIGIN, first, replace(two, content=one.content)).fault
    assert fault is not None
    assert (fault.kind, fault.seq) == (FaultKind.REORDERED, 4)
