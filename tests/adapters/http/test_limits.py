"""The counts of requests: in work, waiting for a body, held; and that nobody gets all of one."""

from functools import partial

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from quart import Blueprint

from rdev.adapters.http.app import HttpLimits
from rdev.adapters.http.envelope import read_json, success
from rdev.adapters.http.limits import Admission, Bodies, Places, Slot
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.ids import KeyId
from rdev.domain.keys import Grant, Principal, Scope
from rdev.ports.telemetry import Silence
from tests.adapters.http.conftest import Wire

ADMIN = Grant(scopes=frozenset({Scope.ADMIN}))


def places(most: int) -> Places:
    return Places(
        name="in_flight", what="are in work", most=most, telemetry=Silence(), is_shared=True
    )


def take_all(counted: Places, holder: str) -> ErrorCode:
    """Take until it is refused; why it is."""
    for _ in range(counted.most + 1):
        try:
            counted.take(holder)
        except RdevError as error:
            return error.code
    raise AssertionError("nobody refused")


@pytest.mark.parametrize(("most", "takes"), [(1, 1), (2, 2), (3, 2), (10, 6), (200, 101)])
def test_one_who_takes_what_it_gets_leaves_about_half(most: int, takes: int) -> None:
    counted = places(most)
    why = take_all(counted, "greedy")
    assert counted.taken == takes
    is_full = takes == most
    assert why is (ErrorCode.SERVICE_UNAVAILABLE if is_full else ErrorCode.TOO_MANY_REQUESTS)


@given(greedy=st.integers(1, 6), most=st.integers(200, 2_000))
def test_each_greedy_one_leaves_half_of_what_it_found(greedy: int, most: int) -> None:
    counted = places(most)
    for n in range(greedy):
        assert take_all(counted, f"greedy {n}") is ErrorCode.TOO_MANY_REQUESTS
    assert most - counted.taken >= most / 2**greedy - 2
    counted.take("modest")


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from(["enter", "read", "hold", "release", "a", "b", "c"]),
        ),
        max_size=80,
    )
)
def test_the_counts_are_those_of_the_slots_whatever_they_do(steps: list[tuple[int, str]]) -> None:
    """Never over a limit, never a place that nobody has; what was given up is in no count."""
    admission = Admission(max_in_flight=3, max_held=2, telemetry=Silence())
    slots = [admission.slot(f"at {n}") for n in range(5)]
    given_up: set[Slot] = set()
    for n, step in steps:
        slot = slots[n]
        try:
            if step in ("a", "b", "c"):
                slot.belong_to(step)
            elif step == "read":
                slot.read(partial(given_up.add, slot))
            else:
                getattr(slot, step)()
        except RdevError as error:
            assert error.retry_after_s == 1.0  # noqa: PT017
        if slot._at is not admission.bodies or step == "read":
            given_up.discard(slot)
        check_counts(admission, slots, given_up)
    for slot in slots:
        slot.release()
    assert all(not counted.taken and not counted._holders for counted in _places(admission))
    assert not admission.bodies.taken
    assert not admission.bodies._waiting


def _places(admission: Admission) -> tuple[Places, Places]:
    return admission.work, admission.held


def check_counts(admission: Admission, slots: list[Slot], given_up: set[Slot]) -> None:
    for counted in _places(admission):
        there = sum(slot._at is counted for slot in slots)
        assert counted.taken == there == sum(counted._holders.values()) <= counted.most
    there = sum(slot._at is admission.bodies and slot not in given_up for slot in slots)
    assert admission.bodies.taken == there <= 3
    assert there == sum(map(len, admission.bodies._waiting.values()))


@given(greedy=st.integers(1, 12), most=st.integers(2, 40), start=st.integers(0, 400))
def test_a_body_that_comes_in_time_is_never_given_up(greedy: int, most: int, start: int) -> None:
    """As long as fewer others begin than there are places, whoever they are."""
    bodies = Bodies(most=most, telemetry=Silence())
    lost: list[str] = []
    for n in range(start):
        bodies.take(f"greedy {n % greedy}", partial(lost.append, "greedy"))
    leave = bodies.take("modest", partial(lost.append, "modest"))
    for n in range(most - 1):
        bodies.take(f"greedy {n % greedy}", partial(lost.append, "greedy"))
    assert "modest" not in lost
    assert bodies.taken <= most
    leave()
    leave()
    assert len(lost) + bodies.taken == start + most - 1


def test_the_oldest_of_whoever_waits_for_most_is_given_up() -> None:
    bodies = Bodies(most=5, telemetry=Silence())
    lost: list[str] = []
    for name in ("a1", "b1", "b2", "b3", "a2", "c1", "c2", "d1"):
        bodies.take(name[0], partial(lost.append, name))
    assert lost == ["b1", "a1", "b2"]


async def authenticate(credential: str | None, client_ip: str) -> Principal:
    """Every key is somebody."""
    return Principal(key_id=KeyId(credential or "nobody"), name="one", grant=ADMIN)


def routes() -> Blueprint:
    made = Blueprint("made", __name__)

    @made.post("/things")
    async def post_thing():
        return success(await read_json())

    @made.post("/unread")
    async def post_unread():
        return success("not read")

    return made


async def slow_body(wire: Wire, key: str, path: str = "/things") -> None:
    """A head, and a body of which half comes."""
    lines = ("Host: x", f"X-API-Key: {key}", "Content-Type: application/json", "Content-Length: 4")
    await wire.send("\r\n".join([f"POST {path} HTTP/1.1", *lines, "", "{ "]).encode())


async def test_slow_bodies_of_one_key_take_nobody_elses_place(serve, eventually):
    """Four times as many as there are places; each request of another key is answered meanwhile,
    also one whose body comes late."""
    most = 10
    site = await serve(routes(), limits=HttpLimits(max_in_flight=most), authenticate=authenticate)
    admission = site.shell.admission
    refused: list[int] = []

    async def attack() -> None:
        async with site.connect() as wire:
            await slow_body(wire, "greedy")
            refused.append((await wire.head()).status)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(4 * most):
            nursery.start_soon(attack)
        await eventually(lambda: len(refused) == 3 * most)
        assert admission.bodies.taken == most
        assert set(refused) == {503}
        assert set(site.telemetry.refused) == {"bodies"}
        async with site.connect() as wire:
            for _ in range(20):
                answer = await site.request(
                    "POST", "/things", body=b"{}", key="modest", content_type="application/json"
                )
                assert answer.status == 200
                await slow_body(wire, "modest")
                await eventually(lambda: "modest" in admission.bodies._waiting)
                await wire.send(b" }")
                assert (await wire.reply()).status == 200
        await eventually(lambda: admission.work.taken == 0)
        nursery.cancel_scope.cancel()
    await eventually(lambda: admission.bodies.taken == 0)


async def test_a_body_that_nobody_waits_for_holds_no_place(serve, eventually):
    """Its request is answered; that the rest of the body is listened to is nobody's cost."""
    site = await serve(routes(), limits=HttpLimits(max_in_flight=2), authenticate=authenticate)
    admission = site.shell.admission
    async with trio.open_nursery() as nursery:

        async def attack(path: str) -> None:
            async with site.connect() as wire:
                await slow_body(wire, "greedy", path)
                await wire.head()
                await trio.sleep_forever()

        for path in ("/unread", "/nowhere") * 10:
            nursery.start_soon(attack, path)
            await eventually(lambda: admission.work.taken + admission.bodies.taken == 0)
            assert (await site.request("POST", "/unread", key="modest")).status == 200
        nursery.cancel_scope.cancel()
