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

from rdev.domain.execution import Stream
from rdev.domain.fields import Characters, Fields, size_fault
from rdev.domain.lines import PIECE_MAX_BYTES, Encoded, LineSplitter, joined, output_events
from rdev.domain.rules import CONTROLS
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
    """What a client asked of claude; made by `read_claude`. `mcp_config` is JSON text."""

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


_SESSION = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# A session's id or its title. A leading dash would be read as an option.
_RESUME = re.compile(rf"[^\s{CONTROLS}-][^{CONTROLS}]*")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]*")
# `Edit`, `mcp__server__*`, `Bash(git log:*)`; a list of them is joined by commas.
_TOOL = re.compile(rf"[A-Za-z][A-Za-z0-9_*.-]*(\([^(){CONTROLS}]*\))?")


_SERVERS_RULE = f"must have the object mcpServers in it; {ARGUMENT_MAX_BYTES} bytes as JSON"


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


def read_claude(fields: Fields) -> ClaudeRequest:
    """Read the fields of a claude command; what is wrong with them stays in `fields`."""
    request = ClaudeRequest(
        prompt=fields.text(
            "prompt",
            max_bytes=ARGUMENT_MAX_BYTES,
            required=True,
            characters=Characters.NO_NUL,
            about="not blank",
        )
        or "",
        session_id=fields.text(
            "session_id", max_bytes=_NAME_MAX_BYTES, pattern=_SESSION, about="not with resume"
        ),
        resume=fields.text("resume", max_bytes=_NAME_MAX_BYTES, pattern=_RESUME),
        model=fields.text("model", max_bytes=_NAME_MAX_BYTES, pattern=_MODEL),
        allowed_tools=_read_tools(fields, "allowed_tools"),
        disallowed_tools=_read_tools(fields, "disallowed_tools"),
        max_turns=fields.integer("max_turns", least=1, most=TURNS_MAX),
        permission_mode=_read_mode(fields),
        append_system_prompt=fields.text(
            "append_system_prompt", max_bytes=ARGUMENT_MAX_BYTES, characters=Characters.NO_NUL
        ),
        mcp_config=_read_servers(fields),
    )
    if request.prompt and not request.prompt.strip():
        fields.fault("prompt", "must not be blank")  # claude would print nothing
    if request.session_id is not None and request.resume is not None:
        fields.fault("session_id", "cannot be combined with resume")
    return request


def _read_tools(fields: Fields, name: str) -> tuple[str, ...]:
    tools = fields.texts(
        name,
        max_items=TOOLS_MAX,
        max_bytes=_TOOL_MAX_BYTES,
        pattern=_TOOL,
        mismatch="must be a tool such as Edit or Bash(git log:*)",
    )
    return tools or ()


def _read_mode(fields: Fields) -> PermissionMode | None:
    mode = fields.choice("permission_mode", [*PermissionMode])
    return None if mode is None else PermissionMode(mode)


def _read_servers(fields: Fields) -> str | None:
    """The JSON text of an MCP configuration; claude wants the key `mcpServers` in it."""
    value = fields.mapping("mcp_config", about=_SERVERS_RULE)
    if value is None:
        return None
    if not isinstance(value.get("mcpServers"), dict):
        fields.fault("mcp_config", "must have the object mcpServers in it")
        return None
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        fields.fault("mcp_config", "must be valid Unicode (it has a lone surrogate)")
        return None
    if (message := size_fault(text, max_bytes=ARGUMENT_MAX_BYTES)) is not None:
        fields.fault("mcp_config", message, limit=True)
    return text


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
