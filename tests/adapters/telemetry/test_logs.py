"""One JSON line per event, with the guide's fields and without secrets."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import structlog
import trio

from rdev.adapters.telemetry.logs import REDACTED, REQUESTS, Levels, configure_logs
from rdev.ports.telemetry import log_context

Lines = Callable[[], list[dict]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What was logged so far; the test's own logging comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    output = io.StringIO()
    configure_logs(level="info", secrets=["hunter2-hunter2", "short"], output=output)
    yield lambda: [json.loads(line) for line in output.getvalue().splitlines()]
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


async def test_a_request_line_has_the_fields_of_the_guide(lines):
    log_context.set({"request_id": "req-abc123", "trace_id": "4bf9"})
    facts = {"method": "POST", "path": "/x", "status": 201, "duration_ms": 45, "client_ip": "::1"}

    logging.getLogger(REQUESTS).info("request completed", extra=facts)

    (line,) = lines()
    assert list(line) == ["level", "time", "msg", "request_id", "trace_id", *facts]
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "msg": "request completed",
        "request_id": "req-abc123",
        "trace_id": "4bf9",
        **facts,
    }


def test_both_kinds_of_logger_write_the_same_and_warning_is_warn(lines):
    logging.getLogger("hypercorn.error").warning("std %s", 1, extra={"k": 2})
    structlog.get_logger("rdev.queue").warning("own", k=2)
    logging.getLogger("x").debug("too quiet")

    first, second = lines()
    assert (first["level"], first["msg"], first["k"]) == ("warn", "std 1", 2)
    assert (second["level"], second["msg"], second["k"]) == ("warn", "own", 2)
    assert first.keys() == second.keys()


def test_an_exception_is_one_line_with_its_trace(lines):
    try:
        raise ValueError("with hunter2-hunter2 inside")
    except ValueError:
        logging.getLogger("x").exception("failed")

    (line,) = lines()
    assert line["level"] == "error"
    assert "Traceback" in line["exception"]
    assert "hunter2" not in line["exception"]


def test_secrets_are_taken_out_by_name_and_by_value(lines):
    logging.getLogger("x").info(
        "dsn is hunter2-hunter2",
        extra={
            "password": "a",
            "api_key": "b",
            "headers": {"Authorization": "c", "x-api-key": "d", "Accept": "e"},
            "env": {"PATH": "f"},
            "stdin": b"g",
            "webhook_secret": "h",
            "argv": ["run", "--pass=hunter2-hunter2"],
            "key_id": "key_1",
            "note": "short",
        },
    )

    (line,) = lines()
    assert line["msg"] == f"dsn is {REDACTED}"
    for name in ("password", "api_key", "env", "stdin", "webhook_secret"):
        assert line[name] == REDACTED
    assert line["headers"] == {"Authorization": REDACTED, "x-api-key": REDACTED, "Accept": "e"}
    assert line["argv"] == ["run", f"--pass={REDACTED}"]
    assert (line["key_id"], line["note"]) == ("key_1", "short")


def test_a_line_is_written_whatever_is_in_it(lines, monkeypatch):
    # Not into pytest's report too, which has to be UTF-8.
    root = logging.getLogger()
    own = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    monkeypatch.setattr(root, "handlers", own)
    deep: dict[str, object] = {}
    deep["self"] = deep

    logging.getLogger("x").info("odd \x00\n\ud800", extra={"deep": deep, "object": object()})

    (line,) = lines()
    assert line["object"].startswith("<object")


async def test_tasks_carry_the_context_of_their_request(lines):
    async def child() -> None:
        logging.getLogger("x").info("child")

    log_context.set({"request_id": "req-1"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)

    assert lines()[0]["request_id"] == "req-1"


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(KeyError):
        configure_logs(level="loud")


def told(name: str) -> set[str]:
    """From which level on this logger writes."""
    logger = logging.getLogger(name)
    return {word for word, number in NUMBER.items() if logger.isEnabledFor(number)}


NUMBER = {"debug": 10, "info": 20, "warn": 30, "error": 40}


def test_a_logger_may_have_a_level_of_its_own_until_it_is_not_named_any_more(lines):
    levels = Levels()
    levels.set("warn", {"psycopg": "debug", "rdev.http": "error"})
    assert told("psycopg.pool") == {"debug", "info", "warn", "error"}
    assert told(REQUESTS) == {"error"}
    assert told("rdev.queue") == {"warn", "error"}

    levels.set("info", {"psycopg": "error"})
    assert told("psycopg") == {"error"}
    assert told(REQUESTS) == {"info", "warn", "error"}

    with pytest.raises(KeyError):
        levels.set("debug", {"psycopg": "loud"})
    assert told("psycopg") == {"error"}
    assert told("rdev") == {"info", "warn", "error"}
    levels.set("info")


def test_requests_to_others_are_told_where_debug_or_their_own_level_asks_for_them(lines):
    levels = Levels()
    for level, own, seen in (
        ("info", {}, {"warn", "error"}),
        ("info", {"httpx2": "info"}, {"info", "warn", "error"}),
        ("debug", {}, {"debug", "info", "warn", "error"}),
        ("error", {}, {"error"}),
        ("info", {}, {"warn", "error"}),
    ):
        levels.set(level, own)
        assert told("httpx2") == seen
    levels.set("info")


@pytest.mark.parametrize("name", ["hypercorn.error", "lightkube", "psycopg", "httpx2"])
def test_what_a_vendor_writes_comes_as_a_line_of_ours_and_nowhere_else(lines, name, capfd):
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    output = io.StringIO()
    configure_logs(level="info", secrets=["hunter2-hunter2"], output=output)

    logger.warning("connecting with %s", "password=hunter2-hunter2")

    (line,) = [json.loads(one) for one in output.getvalue().splitlines()]
    assert (line["level"], line["logger"]) == ("warn", name)
    assert "hunter2" not in line["msg"]
    assert capfd.readouterr().err == ""


ENDS_BADLY = """
import threading, warnings
from rdev.adapters.telemetry.logs import bridge_python, configure_logs

class Finalized:
    def __del__(self):
        raise OSError("finalizer very-secret-value")

def fail():
    raise LookupError("thread very-secret-value")

configure_logs(level="info", secrets=["very-secret-value"])
bridge_python()
warnings.warn("warned of very-secret-value")
Finalized()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise ExceptionGroup("all", [ValueError("postgresql://me:hunter2@/rdev very-secret-value")])
"""


def test_what_python_says_by_itself_are_lines_without_secrets_too():
    ended = subprocess.run(
        [sys.executable, "-W", "default", "-c", ENDS_BADLY],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 1
    assert ended.stderr == ""
    assert [(line["level"], line["logger"]) for line in found] == [
        ("warn", "py.warnings"), ("error", "rdev"), ("error", "rdev"), ("error", "rdev")
    ]  # fmt: skip
    assert "warned of" in found[0]["msg"]
    for line, kind in zip(found[1:], ("OSError", "LookupError", "ExceptionGroup"), strict=True):
        assert kind in line["exception"]
    assert "very-secret-value" not in ended.stdout
    assert "hunter2" not in ended.stdout
