"""What is handed to claude, and what is understood of what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.claude import (
    ARGUMENT_MAX_BYTES,
    EVENT_MAX_BYTES,
    WHOLE_LINE_MAX_BYTES,
    AgentLines,
    AgentSplitter,
    ClaudeRequest,
    PermissionMode,
    claude_argv,
    failed,
    read_claude,
)
from rdev.domain.errors import Fault
from rdev.domain.execution import Stream
from rdev.domain.fields import Fields
from rdev.domain.lines import Encoded, decode
from rdev.domain.sse import split_events

FAKES = Path(__file__).parents[1] / "fakes"
RECORDED = FAKES / "claude"
SESSION = "8b0c4e4e-5b0f-4d3a-9f6e-000000000001"
FULL_BODY: dict[str, object] = {
    "prompt": "fix it",
    "session_id": SESSION,
    "model": "claude-opus-4-8[1m]",
    "allowed_tools": ["Edit", "Bash(git log:*)", "mcp__db__*"],
    "disallowed_tools": ["WebFetch"],
    "max_turns": 7,
    "permission_mode": "acceptEdits",
    "append_system_prompt": "--be brief",
    "mcp_config": {"mcpServers": {"db": {"command": "db-server"}}},
}


def requested(body: dict[str, object]) -> ClaudeRequest:
    fields = Fields(body)
    request = read_claude(fields)
    assert fields.faults == []
    return request


def faults_of(body: dict[str, object]) -> list[Fault]:
    fields = Fields(body)
    read_claude(fields)
    return fields.faults


def numbered(encoded: Encoded) -> list[tuple[str, bytes]]:
    events = split_events(encoded.payload, 1, encoded.events) if encoded.events else []
    return [(name, data) for _, name, data in events]


def agent_events(data: bytes) -> list[dict[str, object]]:
    splitter = AgentSplitter()
    events = numbered(splitter.feed(data)) + numbered(splitter.flush())
    return [json.loads(event) for name, event in events if name == "agent"]


# The request


def test_a_full_body_becomes_the_whole_argv() -> None:
    assert claude_argv(["claude"], requested(FULL_BODY)) == (
        *("claude", "-p", "fix it", "--output-format", "stream-json", "--verbose"),
        *("--session-id", SESSION, "--model", "claude-opus-4-8[1m]"),
        *("--permission-mode", "acceptEdits", "--max-turns", "7"),
        *("--allowedTools", "Edit,Bash(git log:*),mcp__db__*", "--disallowedTools", "WebFetch"),
        *("--append-system-prompt", "--be brief"),
        *("--mcp-config", '{"mcpServers":{"db":{"command":"db-server"}}}'),
    )


def test_a_prompt_alone_is_enough_and_the_command_may_be_several_words() -> None:
    argv = claude_argv(["nice", "claude"], requested({"prompt": "hi", "model": None}))
    assert argv == (
        *("nice", "claude", "-p", "hi"),
        *("--output-format", "stream-json", "--verbose"),
    )


@pytest.mark.parametrize("prompt", ["--version", "-p", "--", "-", "-x y\nz"])
def test_a_prompt_that_begins_with_a_dash_stands_behind_the_options(prompt: str) -> None:
    argv = claude_argv(["claude"], requested(FULL_BODY | {"prompt": prompt}))
    assert argv[:3] == ("claude", "-p", "--output-format")
    assert argv[-2:] == ("--", prompt)


def test_a_resumed_session_is_named() -> None:
    argv = claude_argv(["claude"], requested({"prompt": "go on", "resume": "my title"}))
    assert argv[-2:] == ("--resume", "my title")


def test_all_faults_are_reported_together() -> None:
    body: dict[str, object] = {
        "session_id": "abc",
        "resume": "-x",
        "model": "--help",
        "allowed_tools": ["Edit", "-x", "A,B"],
        "disallowed_tools": "Edit",
        "max_turns": 0,
        "permission_mode": "yolo",
        "append_system_prompt": 5,
        "mcp_config": {"servers": {}},
    }
    assert sorted(fault.pointer for fault in faults_of(body)) == [
        "/allowed_tools/1",
        "/allowed_tools/2",
        "/append_system_prompt",
        "/disallowed_tools",
        "/max_turns",
        "/mcp_config",
        "/model",
        "/permission_mode",
        "/prompt",
        "/resume",
        "/session_id",
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "", "must not be empty"),
        ("prompt", " \n", "must not be blank"),
        ("prompt", 7, "must be a string"),
        ("prompt", "a\0b", "must not contain NUL"),
        ("prompt", "\ud800", "must be valid Unicode (it has a lone surrogate)"),
        ("prompt", "ß" * 65_536, "must be at most 131071 bytes (it has 131072)"),
        ("max_turns", True, "must be a whole number"),
        ("max_turns", 1.5, "must be a whole number"),
        ("max_turns", 1001, "must be from 1 to 1000"),
        ("permission_mode", ["plan"], f"must be one of {', '.join(PermissionMode)}"),
        ("mcp_config", "/etc/mcp.json", "must be an object"),
        (
            "mcp_config",
            {"mcpServers": {"a": "\ud800"}},
            "must be valid Unicode (it has a lone surrogate)",
        ),
        (
            "resume",
            "two\nlines",
            "must not contain control characters (it has U+000A)",
        ),
        ("resume", "x" * 201, "must be at most 200 bytes (it has 201)"),
        ("allowed_tools", ["Edit"] * 101, "must have at most 100 items"),
    ],
)
def test_a_bad_field_is_refused(field: str, value: object, message: str) -> None:
    faults = faults_of({"prompt": "hi"} | {field: value})
    assert [(fault.pointer, fault.message) for fault in faults] == [(f"/{field}", message)]


def test_a_session_cannot_be_both_new_and_resumed() -> None:
    body: dict[str, object] = {"prompt": "hi", "session_id": SESSION, "resume": SESSION}
    assert [fault.pointer for fault in faults_of(body)] == ["/session_id"]


@given(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text))
def test_any_prompt_is_one_word_and_never_an_option(prompt: str) -> None:
    fields = Fields({"prompt": prompt})
    request = read_claude(fields)
    if not fields.faults:
        argv = claude_argv(["claude"], request)
        assert argv.count(prompt) >= 1
        assert not prompt.startswith("-") or argv[argv.index("--") + 1] == prompt
        assert len(prompt.encode()) <= ARGUMENT_MAX_BYTES


# The output


def test_a_run_without_login_failed_although_its_subtype_says_success() -> None:
    splitter = AgentSplitter()
    splitter.feed((RECORDED / "logged_out.jsonl").read_bytes())
    agent = splitter.agent
    assert (agent.result_seen, agent.is_error) == (True, True)
    assert failed(1, agent)
    assert failed(0, agent), "is_error counts even where the exit code says nothing"


def test_a_resume_of_an_unknown_session_failed() -> None:
    splitter = AgentSplitter()
    splitter.feed((RECORDED / "resume_unknown.jsonl").read_bytes())
    assert failed(1, splitter.agent)


def test_a_good_run_gives_its_session_its_usage_and_every_line_as_an_event() -> None:
    recorded = (RECORDED / "success.jsonl").read_bytes()
    splitter = AgentSplitter()
    encoded = splitter.feed(recorded)
    agent = splitter.agent
    assert agent.session_id == "00000000-0000-4000-8000-000000000001"
    assert agent.usage is not None
    assert (agent.usage["total_cost_usd"], agent.usage["num_turns"]) == (0.0123, 2)
    assert not failed(0, agent)
    assert failed(1, agent)
    assert failed(None, agent)
    lines = recorded.splitlines()
    assert encoded.events == 2 * len(lines)
    assert encoded.consumed_bytes == len(recorded)
    assert [name for name, _ in numbered(encoded)] == ["output", "agent"] * len(lines)
    assert [data for name, data in numbered(encoded) if name == "agent"] == lines
    assert decode(encoded.payload, Stream.STDOUT) == recorded


def test_a_missing_result_is_seen_and_is_no_failure_by_itself() -> None:
    agent = AgentLines()
    assert not agent.result_seen
    assert not failed(0, agent)


@pytest.mark.parametrize(
    "line",
    [
        b"plain text",
        b"",
        b"[1]",
        b"{",
        b'{"type":"\xff"}',
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b'{"a":1} {"b":2}',
        b'"text"',
    ],
)
def test_a_line_that_is_no_json_object_gives_no_agent_event(line: bytes) -> None:
    assert agent_events(line + b"\n") == []


def test_unknown_types_and_objects_without_one_pass_through() -> None:
    lines = b'{"type":"brand_new","x":{"y":[1]}}\n{"no_type":true}\n{}\n'
    assert agent_events(lines) == [{"type": "brand_new", "x": {"y": [1]}}, {"no_type": True}, {}]


def test_a_carriage_return_never_reaches_the_event() -> None:
    splitter = AgentSplitter()
    events = numbered(splitter.feed(b'{"type":"x",\r "a":1.50}\r\n'))
    assert events[1] == ("agent", b'{"type":"x","a":1.50}')


def test_half_a_surrogate_pair_is_replaced_and_the_line_still_read() -> None:
    line = rb'{"type":"result","is_error":true,"result":"a\ud83d b\\ud83d c\ud83d\ude00 \uDE00"}'
    splitter = AgentSplitter()
    events = numbered(splitter.feed(line + b"\n"))
    assert json.loads(events[1][1])["result"] == "a\ufffd b\\ud83d c😀 \ufffd"
    assert splitter.agent.is_error


def test_wrong_types_of_known_fields_are_not_learned() -> None:
    splitter = AgentSplitter()
    splitter.feed(b'{"type":"result","is_error":"yes","session_id":5}\n{"type":["result"]}\n')
    agent = splitter.agent
    assert (agent.session_id, agent.is_error, agent.result_seen) == (None, False, True)


def test_a_long_line_comes_truncated_but_its_facts_are_learned() -> None:
    line = b'{"text":"%b","is_error":true,"type":"result","num_turns":3}' % (b"x" * EVENT_MAX_BYTES)
    splitter = AgentSplitter()
    events = numbered(splitter.feed(line + b"\n"))
    assert [name for name, _ in events] == ["output"] * 17 + ["agent"]
    assert json.loads(events[-1][1]) == {"type": "result", "truncated": True, "bytes": len(line)}
    assert splitter.agent.is_error
    assert splitter.agent.usage == {"num_turns": 3}


def test_a_line_of_exactly_the_limit_is_not_truncated() -> None:
    head = b'{"type":"x","t":"'
    line = head + b"x" * (EVENT_MAX_BYTES - len(head) - 2) + b'"}'
    assert "truncated" not in agent_events(line + b"\n")[0]
    assert "truncated" in agent_events(line.replace(b'"x"', b'"xy"') + b"\n")[0]


def test_a_line_beyond_reading_gives_its_leading_type_and_is_not_kept() -> None:
    agent = AgentLines()
    block = b"x" * 1_000_000
    agent.take(b'{"type":"result","is_error":false,"result":"')
    for _ in range(WHOLE_LINE_MAX_BYTES // len(block) + 5):
        agent.take(block)
    assert len(agent._line) == WHOLE_LINE_MAX_BYTES
    event = json.loads(agent.take(b'"}\n') or b"")
    assert event["type"] == "result"
    assert event["bytes"] > WHOLE_LINE_MAX_BYTES
    assert agent.result_seen
    assert len(agent._line) == 0


def test_a_last_line_without_its_newline_counts_when_the_output_ends() -> None:
    splitter = AgentSplitter()
    splitter.feed(b'{"type":"result","is_error":true}')
    assert [name for name, _ in numbered(splitter.flush(idle=True))] == ["output"]
    assert not splitter.agent.result_seen
    assert [name for name, _ in numbered(splitter.flush())] == ["agent"]
    assert splitter.agent.is_error


def test_a_line_written_in_pauses_is_still_one_agent_event() -> None:
    splitter = AgentSplitter()
    names = []
    for piece in (b'{"type":', b'"x"', b"}\n"):
        names += [name for name, _ in numbered(splitter.feed(piece))]
        names += [name for name, _ in numbered(splitter.flush(idle=True))]
    assert names == ["output", "output", "output", "agent"]


def test_a_replayed_gap_drops_the_unfinished_line_alone() -> None:
    splitter = AgentSplitter()
    splitter.replay(b'{"stream":"stdout","line":"{\\"type\\":","partial":true}')
    splitter.replay(b'g{"stream":"stdout","dropped_bytes":5}')
    splitter.replay(b'{"stream":"stdout","line":"{\\"session_id\\":\\"s\\"}"}')
    assert splitter.agent.session_id == "s"


pieces = st.sampled_from(
    [
        b'{"type":"x"}\n',
        b'{"type":"result","is_error":true}\n',
        b'{"session_id":"s1"}\n',
        *(b"text\n", b'{"a":', b"1}", b"\n", b"\xff", b"y" * 20),
    ]
)


@given(st.lists(pieces), st.integers(0, 200), st.sampled_from([8, 16_384]))
def test_a_take_over_at_the_consumed_offset_gives_the_same_events_and_facts(
    parts: list[bytes], cut: int, limit: int
) -> None:
    data = b"".join(parts)
    alone = AgentSplitter(piece_max_bytes=limit)
    expected = numbered(alone.feed(data)) + numbered(alone.flush())
    before, after = AgentSplitter(piece_max_bytes=limit), AgentSplitter(piece_max_bytes=limit)
    stored = before.feed(data[:cut])
    after.replay(stored.payload)
    found = numbered(stored) + numbered(after.feed(data[stored.consumed_bytes :]))
    assert found + numbered(after.flush()) == expected
    for name in ("session_id", "usage", "result_seen", "is_error"):
        assert getattr(after.agent, name) == getattr(alone.agent, name)


# The fake, which other suites run as RDEV_CLAUDE_COMMAND


def run_fake(body: dict[str, object]) -> tuple[int, AgentSplitter, bytes]:
    argv = claude_argv([sys.executable, str(FAKES / "claude_cli.py")], requested(body))
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, env={})
    splitter = AgentSplitter()
    payload = splitter.feed(done.stdout).payload
    return done.returncode, splitter, payload


@pytest.mark.parametrize(
    ("mode", "exit_code", "is_failure"),
    [
        ("success", 0, False),
        ("logged-out", 1, True),
        ("resume-unknown", 1, True),
        ("big-line", 0, False),
        ("garbage", 0, False),
        ("no-result", 0, False),
    ],
)
def test_the_fake_ends_as_its_mode_says(mode: str, exit_code: int, is_failure: bool) -> None:
    code, splitter, payload = run_fake({"prompt": mode})
    assert (code, failed(code, splitter.agent)) == (exit_code, is_failure)
    assert splitter.agent.result_seen == (mode != "no-result")
    assert (b'a{"type":"user","truncated":true' in payload) == (mode == "big-line")


def test_the_fake_takes_every_option_that_a_request_can_have() -> None:
    code, splitter, _ = run_fake(FULL_BODY | {"prompt": "--begins with a dash"})
    assert (code, splitter.agent.session_id) == (0, SESSION)
