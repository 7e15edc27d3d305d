"""The harness judges what it should, and the load client reads what a server may send."""

import hashlib
import json
import socket
from pathlib import Path

import pytest

from bench.__main__ import load, main, scenario_names
from bench.client import Dechunker
from bench.fanout import SCENARIO as FANOUT
from bench.fanout import SMALL, once
from bench.harness import Context, Figure, Scenario, percentile, ratios, run, table, write
from bench.output_throughput import _sha256_of_lines
from bench.sse_load import Client, Load, Plan
from tests.coverage_floors import FLOORS_PERCENT, rooms

SLOWEST = Figure(name="slowest", unit="ms", at_most=30)
FASTEST = Figure(name="fastest", unit="/s", at_least=500)
SCENARIO = Scenario(
    name="made_up",
    what="Figures made up for the test.",
    figures=(SLOWEST, FASTEST, Figure(name="free", unit="")),
    measure=lambda _: {"slowest": [10.0, 31.0, 29.0], "fastest": 499.0, "free": 1, "more": 2.0},
)


def test_the_median_is_held_against_the_target_and_the_spread_is_shown() -> None:
    rows, _ = run(SCENARIO, Context())

    assert [(row.median, row.least, row.most, row.met) for row in rows] == [
        (29.0, 10.0, 31.0, True),
        (499.0, 499.0, 499.0, False),
        (1.0, 1.0, 1.0, None),
    ]
    printed = table(SCENARIO, rows)
    assert "| slowest | 29 ms | 10 – 31 | 3 | ≤ 30 | met |" in printed
    assert "| fastest | 499 /s | 499 – 499 | 1 | ≥ 500 | **missed** |" in printed


def test_the_warm_up_is_no_sample() -> None:
    numbers = iter(range(10))

    samples = Context(repetitions=3, warm_ups=2).repeat(lambda: {"number": float(next(numbers))})

    assert samples == {"number": [2.0, 3.0, 4.0]}


def test_ratios_pair_what_was_measured_in_the_same_repetition() -> None:
    assert ratios([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]

    assert [percentile(values, percent) for percent in (0, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0


def test_the_results_are_kept_with_every_sample(tmp_path: Path) -> None:
    rows, measurement = run(SCENARIO, Context())

    markdown = write(tmp_path / "results", "stem", {"made_up": (SCENARIO, rows, measurement)})

    kept = json.loads(markdown.with_suffix(".json").read_text())["scenarios"]["made_up"]
    assert kept["measurement"]["more"] == 2.0
    assert kept["figures"][0]["samples"] == [10.0, 31.0, 29.0]
    assert table(SCENARIO, rows) in markdown.read_text()


def test_every_scenario_is_found_and_has_the_name_of_its_file() -> None:
    for name in ("command_roundtrip", "output_throughput"):
        assert name in scenario_names()
        scenario = load(name)
        assert scenario is not None
        assert scenario.name == name


def test_a_name_that_is_no_scenario_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["no_such_scenario"])

    assert ended.value.code == 2
    assert "command_roundtrip" in capsys.readouterr().err


def test_a_chunked_body_is_read_wherever_it_is_cut() -> None:
    wire = b"5\r\nab\r\nc\r\n1;x=y\r\nd\r\n0\r\n\r\n"

    for size in range(1, len(wire) + 1):
        dechunker = Dechunker()
        pieces = [wire[start : start + size] for start in range(0, len(wire), size)]
        assert b"".join(dechunker.feed(piece) for piece in pieces) == b"ab\r\ncd"
        assert dechunker.ended


def _stream(*, second_id: int = 2) -> list[bytes]:
    return [
        b'event: connected\ndata: {}\n\nid: 1\nevent: output\ndata: {"line":"a"}\n\n',
        b'id: %d\nevent: output\ndata: {"line":"b","partial":true}\n\n' % second_id,
        b"id: 3\nevent: complete\ndata: {}\n\n",
    ]


def test_the_same_bytes_have_the_same_hash_and_a_hole_is_seen() -> None:
    assert _sha256_of_lines(_stream()) == hashlib.sha256(b"a\nb").hexdigest()
    with pytest.raises(RuntimeError, match="follows 1"):
        _sha256_of_lines(_stream(second_id=3))
    with pytest.raises(RuntimeError, match="without complete"):
        _sha256_of_lines(_stream()[:1])


def test_each_room_has_its_floor_of_coverage() -> None:
    def file(covered: int, missed: int) -> dict[str, dict[str, int]]:
        counts = {"covered_lines": covered, "num_statements": covered + missed}
        return {"summary": counts | {"covered_branches": 2, "num_branches": 2}}

    found = rooms({"rdev/domain/a.py": file(97, 1), "rdev/services/b.py": file(95, 3)})

    assert [room.prefix for room in found] == list(FLOORS_PERCENT)
    assert [(room.covered, room.all, room.is_held) for room in found] == [
        (99, 100, False),
        (97, 100, True),
        (196, 200, True),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_row_of_the_fan_out_is_measured_and_every_id_is_looked_at() -> None:
    found = once(SMALL, peers=[])

    ratios_and_peers = ("_to_", "nchan", "starlette")
    for figure in FANOUT.figures:
        if not any(part in figure.name for part in ratios_and_peers):
            assert found[figure.name] >= 0, figure.name
    assert found["lines_delivered"] == SMALL.commands * SMALL.readers_each * SMALL.lines


def test_a_load_client_sees_a_hole_and_a_double() -> None:
    load = Load(Plan(port=0, paths=["/"], clients=1, events=3))
    here, there = socket.socketpair()
    with here, there:
        for numbers in ((1, 3, 4), (1, 2, 2), (1, 2)):
            text = b"".join(b"\nid: %d\n" % number for number in numbers)
            load._clients = {1: Client(socket=here, path="/", received=[text[:5], text[5:]])}
            with pytest.raises(RuntimeError, match=r"holes or doubles|of 3 events"):
                load.check()
