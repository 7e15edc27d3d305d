"""The claude command line: a request becomes an argv, its stdout becomes `agent` events.

Owns what a client may ask of claude, and what is learned from its stream of JSON lines. Bounded by
`WHOLE_LINE_MAX_BYTES`: that much of one line is kept until it ends.
Source: `claude --help` and runs of Claude Code 2.1.197 without a login (tests/fakes/claude).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from rdev.domain.errors import Fault
from rdev.domain.execution import Stream
from rdev.domain.lines import PIECE_MAX_BYTES, Encoded, LineSplitter, joined, output_events
from rdev.domain.sse import TAGS, EventName, stored

# One argv element on Linux: MAX_ARG_STRLEN is 128 KiB with its closing NUL.
ARGUMENT_MAX_BYTES = 131_071
# An agent event over this comes as {type, truncated, bytes} (the HTTP contract).
EVENT_MAX_BYTES = 262_144
# Of a longer line only the type is learned, and that only where it stands first.
WHOLE_LINE_MAX_BYTES = 8_388_608
TOOLS_MAX = 100
TURNS_MAX = 1_000
_NAME_MAX_BYTES = 200
_TOOL_MAX_BYTES = 500


class PermissionMode(StrEnum):
    """What claude may do without asking. Another mode ends claude with exit code 1."""

    ACCEPT_EDITS = "acceptEdits"
    AUTO = "auto"
    BYPASS_PERMISSIONS = "bypassPermissions"
    DEFAULT = "default"
    DONT_ASK = "dontAsk"
    PLAN = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaudeRequest:
    """What a client asked of claude; made by `parse_claude`. `mcp_config` is JSON text."""

    prompt: str
    session_id: str | None = None
    resume: str | None = None
    model: str | None = None
    allowed_tools: tuple[str, ...] = ()
    disallowed_tools: tuple[str, ...] = ()
    max_turns: int | None = None
    permission_mode: PermissionMode | None = None
    append_system_prompt: str | None = None
    mcp_config: str | None = None


# The fields of a body that `parse_claude` reads; others are the caller's.
CLAUDE_FIELDS = frozenset(ClaudeRequest.__dataclass_fields__)

_SESSION = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# A session's id or its title. A leading dash would be read as an option.
_RESUME = re.compile(r"[^\s-][^\x00-\x1f]*")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]*")
# `Edit`, `mcp__server__*`, `Bash(git log:*)`; a list of them is joined by commas.
_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_*.-]*(\([^()\x00-\x1f]*\))?")


def claude_argv(command: Sequence[str], request: ClaudeRequest) -> tuple[str, ...]:
    """The whole argv: `command`, print mode with the prompt, stream-json, the options asked for.

    A prompt is one word however it begins: after a `--` where it begins with a dash. stdin must be
    at its end, or claude waits for more of the prompt.
    """
    values = {
        "--session-id": request.session_id,
        "--resume": request.resume,
        "--model": request.model,
        "--permission-mode": request.permission_mode,
        "--max-turns": None if request.max_turns is None else str(request.max_turns),
        "--allowedTools": ",".join(request.allowed_tools) or None,
        "--disallowedTools": ",".join(request.disallowed_tools) or None,
        "--append-system-prompt": request.append_system_prompt,
        "--mcp-config": request.mcp_config,
    }
    options = ["--output-format", "stream-json", "--verbose"]
    for option, value in values.items():
        options += [] if value is None else [option, str(value)]
    if request.prompt.startswith("-"):
        return (*command, "-p", *options, "--", request.prompt)
    return (*command, "-p", request.prompt, *options)


def parse_claude(body: Mapping[str, object]) -> ClaudeRequest | list[Fault]:
    """The request in a body, or everything that is wrong with it. null is the same as absent.

    Fields outside `CLAUDE_FIELDS` are not looked at.
    """
    fields = _Fields(body)
    request = ClaudeRequest(
        prompt=fields.text("prompt", required=True) or "",
        session_id=fields.word("session_id", _SESSION, "a UUID"),
        resume=fields.word("resume", _RESUME, "a session id or title"),
        model=fields.word("model", _MODEL, "a model's name"),
        allowed_tools=fields.tools("allowed_tools"),
        disallowed_tools=fields.tools("disallowed_tools"),
        max_turns=fields.turns("max_turns"),
        permission_mode=fields.mode("permission_mode"),
        append_system_prompt=fields.text("append_system_prompt"),
        mcp_config=fields.servers("mcp_config"),
    )
    if request.session_id is not None and request.resume is not None:
        fields.refuse("session_id", "cannot be combined with resume")
    return fields.faults or request


class _Fields:
    """Reads typed fields out of a body and collects what is wrong with them."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self._body = body
        self.faults: list[Fault] = []

    def refuse(self, pointer: str, message: str) -> None:
        self.faults.append(Fault(pointer=f"/{pointer}", message=message))

    def text(self, name: str, *, required: bool = False) -> str | None:
        """Free text that fits into one argument and is not blank (claude would print nothing)."""
        value = self._body.get(name)
        if value is None and not required:
            return None
        if not isinstance(value, str) or not value.strip():
            self.refuse(name, "must be text that is not blank")
            return None
        return value if self._fits(name, value, ARGUMENT_MAX_BYTES) else None

    def word(self, name: str, pattern: re.Pattern[str], what: str) -> str | None:
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self.refuse(name, f"must be {what}")
            return None
        return value if self._fits(name, value, _NAME_MAX_BYTES) else None

    def tools(self, name: str) -> tuple[str, ...]:
        value = self._body.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or len(value) > TOOLS_MAX:
            self.refuse(name, f"must be a list of at most {TOOLS_MAX} tools")
            return ()
        return tuple([tool for i, tool in enumerate(value) if self._is_tool(f"{name}/{i}", tool)])

    def _is_tool(self, pointer: str, tool: object) -> bool:
        if not isinstance(tool, str) or not _TOOL.fullmatch(tool):
            self.refuse(pointer, "must be a tool such as Edit or Bash(git log:*)")
            return False
        return self._fits(pointer, tool, _TOOL_MAX_BYTES)

    def turns(self, name: str) -> int | None:
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= TURNS_MAX:
            self.refuse(name, f"must be a whole number from 1 to {TURNS_MAX}")
            return None
        return value

    def mode(self, name: str) -> PermissionMode | None:
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, str) or value not in set(PermissionMode):
            self.refuse(name, f"must be one of {', '.join(PermissionMode)}")
            return None
        return PermissionMode(value)

    def servers(self, name: str) -> str | None:
        """The JSON text of an MCP configuration; claude wants the key `mcpServers` in it."""
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("mcpServers"), dict):
            self.refuse(name, "must be an object with the object mcpServers in it")
            return None
        try:
            text = msgspec.json.encode(value).decode()
        except UnicodeEncodeError:
            self.refuse(name, "holds text that is not Unicode")
            return None
        return text if self._fits(name, text, ARGUMENT_MAX_BYTES) else None

    def _fits(self, pointer: str, text: str, max_bytes: int) -> bool:
        try:
            size_bytes = len(text.encode())
        except UnicodeEncodeError:
            self.refuse(pointer, "is not Unicode text")
            return False
        if "\0" in text:
            self.refuse(pointer, "must not hold a NUL character")
        elif size_bytes > max_bytes:
            self.refuse(pointer, f"is {size_bytes} bytes long; at most {max_bytes} are allowed")
        return "\0" not in text and size_bytes <= max_bytes


class _Known(msgspec.Struct):
    """What is learned from a line; all else is skipped without being built."""

    type: object = None
    session_id: object = None
    is_error: object = None
    usage: object = None
    modelUsage: object = None  # noqa: N815  (claude's own spelling)
    total_cost_usd: object = None
    num_turns: object = None
    duration_ms: object = None
    duration_api_ms: object = None


class _Truncated(msgspec.Struct, kw_only=True):
    """The agent event of a line that is too long to pass through."""

    type: str
    truncated: bool = True
    bytes: int


_USAGE = (
    "usage", "modelUsage", "total_cost_usd", "num_turns", "duration_ms", "duration_api_ms",
)  # fmt: skip
_known = msgspec.json.Decoder(_Known)
_object = msgspec.json.Decoder(dict[str, object])
# Where a line is too long to be read: its type, where that stands first.
_LEADING_TYPE = re.compile(rb'\s*\{\s*"type"\s*:\s*"([A-Za-z0-9_.-]{1,100})"')
# A backslash pair, a surrogate pair, or (group 1) half of one: valid JSON, but no Unicode text.
# claude prints it where a tool's output was cut inside an emoji.
_HALF_PAIR = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)


class AgentLines:
    """Reads claude's stdout, line by line, and keeps what the command's row needs.

    `session_id` is the last one named. `usage` holds the figures of the `result` line under
    claude's own keys. `is_error` is that of the `result` line; `result_seen` says that there was
    one: after it claude may hang (anthropics/claude-code#25629), and nothing more is to be waited
    for.
    """

    def __init__(self) -> None:
        """Start at a line's beginning with nothing known."""
        self.session_id: str | None = None
        self.usage: dict[str, object] | None = None
        self.result_seen = False
        self.is_error = False
        self._line = bytearray()
        self._line_bytes = 0

    def take(self, segment: bytes) -> bytes | None:
        """The agent event (JSON) of the line that ends with this segment, if it is one.

        `segment` continues the line, and only its last byte may be a newline. A line that is not
        a JSON object gives no event.
        """
        body = segment.removesuffix(b"\n")
        self._line += body[: WHOLE_LINE_MAX_BYTES - len(self._line)]
        self._line_bytes += len(body)
        return self.end() if len(body) < len(segment) else None

    def end(self) -> bytes | None:
        """The same for a line that ends here, with the output, and without its newline."""
        line, size_bytes = bytes(self._line), self._line_bytes
        self.forget()
        if size_bytes > WHOLE_LINE_MAX_BYTES:
            return self._beyond_reading(line, size_bytes)
        if not line.lstrip().startswith(b"{"):
            return None
        try:
            return self._read(line.strip(), size_bytes)
        except (ValueError, RecursionError):  # no JSON, or nested thousands deep
            return None

    def forget(self) -> None:
        """Drop the unfinished line: part of it is missing."""
        self._line.clear()
        self._line_bytes = 0

    def _read(self, line: bytes, size_bytes: int) -> bytes:
        if size_bytes > EVENT_MAX_BYTES:
            known = msgspec.structs.asdict(_known.decode(line))
            self._learn(known)
            kind = known["type"]
            return _truncated(kind if isinstance(kind, str) else "unknown", size_bytes)
        try:
            known = _object.decode(line)
        except msgspec.DecodeError:
            line = _HALF_PAIR.sub(lambda m: rb"\ufffd" if m[1] else m[0], line)
            known = _object.decode(line)
        self._learn(known)
        # JSON allows \r between its words; in an event stream it would end the line.
        return msgspec.json.format(line, indent=-1) if b"\r" in line else line

    def _learn(self, known: Mapping[str, object]) -> None:
        session = known.get("session_id")
        if isinstance(session, str) and 0 < len(session) <= _NAME_MAX_BYTES:
            self.session_id = session
        if known.get("type") == "result":
            self.result_seen = True
            self.is_error = known.get("is_error") is True
            figures = {name: known.get(name) for name in _USAGE}
            self.usage = {name: value for name, value in figures.items() if value is not None}

    def _beyond_reading(self, line: bytes, size_bytes: int) -> bytes | None:
        if (found := _LEADING_TYPE.match(line)) is None:
            return None
        kind = found[1].decode()
        self.result_seen = self.result_seen or kind == "result"
        return _truncated(kind, size_bytes)


class AgentSplitter:
    """A line splitter for claude's stdout that adds the `agent` events.

    An agent event stands directly behind the output event that ends its line; `events` counts
    both. Same promises as `LineSplitter`, except that a payload also holds each line once more.
    """

    def __init__(self, *, piece_max_bytes: int = PIECE_MAX_BYTES) -> None:
        """Start at a line's beginning; after a take-over `replay` comes first."""
        self.agent = AgentLines()
        self._lines = LineSplitter(Stream.STDOUT, piece_max_bytes=piece_max_bytes)

    def replay(self, payload: bytes) -> None:
        """Learn from a chunk that is already stored, so that a take-over knows what was known.

        Give all stored chunks of the command in order, then feed from the consumed offset.
        """
        for line in payload.split(b"\n"):
            if line.startswith(TAGS[EventName.GAP]):
                self.agent.forget()
            for output in output_events(line, Stream.STDOUT):
                self.agent.take(output.content())

    def feed(self, data: bytes) -> Encoded:
        """The events of every line that ends in `data`, and of pieces that grew too long."""
        parts: list[Encoded] = []
        for segment in re.findall(rb"[^\n]*\n|[^\n]+", data):
            parts += [self._lines.feed(segment), _agent_event(self.agent.take(segment))]
        return joined(*parts)

    def flush(self, *, idle: bool = False) -> Encoded:
        """The unfinished rest as a `partial` piece, see `LineSplitter.flush`.

        Unless `idle` the output has ended, and with it the last line.
        """
        rest = self._lines.flush(idle=idle)
        return rest if idle else joined(rest, _agent_event(self.agent.end()))


def failed(exit_code: int | None, agent: AgentLines) -> bool:
    """Whether a claude command failed; None is an exit by a signal.

    The exit code and `is_error` are trusted, `subtype` never: a run without a login ended with
    `"subtype":"success","is_error":true`.
    """
    return exit_code != 0 or agent.is_error


def _agent_event(event: bytes | None) -> Encoded:
    if event is None:
        return Encoded()
    return Encoded(payload=stored(EventName.AGENT, event), events=1)


def _truncated(kind: str, size_bytes: int) -> bytes:
    return msgspec.json.encode(_Truncated(type=kind[:100], bytes=size_bytes))
