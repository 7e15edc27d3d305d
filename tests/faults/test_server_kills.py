"""A server that is killed again and again at random while commands write: nothing is lost.

The seed of a failed run is in its message; RDEV_TEST_KILLS sets how many kills there are.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.app.server import DEADLINE_S, Api, Event, Server, open_api, open_server

COMMANDS = 3
KILLS = int(os.environ.get("RDEV_TEST_KILLS", "4"))

# Each line goes to both streams; the ledger is what the command itself knows of its starts.
SCRIPT = """
echo started {name} >> {folder}/ledger
n=0
while [ ! -e {folder}/gate ]; do
  n=$((n+1)); echo "{name} $n"; echo "{name} $n" >&2
  [ $((n % 200)) != 0 ] || printf 'not yet '
done
echo "$n" > {folder}/last.{name}
"""


@pytest.fixture
def server(quick_place: Path) -> Iterator[Server]:
    with open_server(quick_place) as server:
        server.keep_port()
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [KILLS, pytest.param(40, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
async def test_random_kills_lose_nothing_and_start_nothing_twice(
    server: Server, kills: int
) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    async with open_api(server) as api:
        await api.project()
        names = [f"c{number}" for number in range(COMMANDS)]
        # Slow enough that the log of many restarts stays small, fast enough for full batches.
        scripts = [
            SCRIPT.format(name=name, folder=server.state_dir).replace(
                "done\n", "sleep 0.005; done\n"
            )
            for name in names
        ]
        commands = [await api.submit(script) for script in scripts]
    seen: dict[str, list[Event]] = {command: [] for command in commands}

    for _ in range(kills):
        # From before the server is ready to well into its work.
        with trio.move_on_after(chance.uniform(0.02, 1.5)):
            await follow_all(server, seen)
        server.kill()
        server.start(ready=chance.random() < 0.5)

    (server.state_dir / "gate").touch()
    async with open_api(server) as api:
        for command in commands:
            assert (await api.ended(command))["status"] == "succeeded", seed
        for name, command in zip(names, commands, strict=True):
            await check(api, server, name, command, seen[command], seed)
    ledger = (server.state_dir / "ledger").read_text().splitlines()
    assert sorted(ledger) == [f"started {name}" for name in names], seed


async def follow_all(server: Server, seen: dict[str, list[Event]]) -> None:
    """Watch every command from where its watcher is, until cancelled."""
    async with open_api(server) as api, trio.open_nursery() as nursery:
        for command, events in seen.items():
            nursery.start_soon(follow, api, command, events)


async def follow(api: Api, command: str, into: list[Event]) -> None:
    last = into[-1].seq if into else None
    try:
        async with api.stream(command, last_id=last) as events:
            async for event in events:
                if event.seq is not None:
                    into.append(event)
    except OSError:
        pass  # not up yet


async def check(
    api: Api, server: Server, name: str, command: str, live: list[Event], seed: int
) -> None:
    """What was watched over all the kills, what is stored, and the journal say the same."""
    with trio.fail_after(2 * DEADLINE_S):
        replayed = [event for event in await api.events(command) if event.seq]
        rest = await api.events(command, last_id=live[-1].seq if live else 0)
    assert live + [event for event in rest if event.seq] == replayed, seed
    assert [event.seq for event in replayed] == list(range(1, len(replayed) + 1)), seed
    last = int((server.state_dir / f"last.{name}").read_text())
    for stream, journal in (("stdout", "out"), ("stderr", "err")):
        written = (server.projects / ".commands" / command / journal).read_bytes()
        shown = b"".join(event.content for event in replayed if event.data.get("stream") == stream)
        assert shown == written, seed
        lines = shown.replace(b"not yet ", b"").splitlines()
        assert lines == [f"{name} {n}".encode() for n in range(1, last + 1)], seed
    assert replayed[-1].name == "complete", seed
