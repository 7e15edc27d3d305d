"""Where a piece of work stands in a trace, as one process tells another.

Source: W3C Trace Context, level 1. What is not valid is no context: the work begins a trace of its
own. Bounds: the length and the number of members of a `tracestate`.
"""

import re
from dataclasses import dataclass

STATE_MAX_CHARACTERS = 512
STATE_MEMBERS_MAX = 32
_SAMPLED = 0x01

# Section 3.2: version ff and ids of zeros are invalid; later versions append.
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})"
    r"-(?P<parent>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
# Section 3.3.1.3, a list member.
_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """A place in a trace: what comes next is below `span_id`.

    Ids are lower-case hexadecimal, of 32 and 16 digits, not all zeros. `is_sampled`: whoever
    recorded it so far did. `state` is what other tracing systems want handed on, "" for nothing.
    """

    trace_id: str
    span_id: str
    is_sampled: bool
    state: str = ""

    @property
    def traceparent(self) -> str:
        """The header of this name, and the variable `TRACEPARENT`."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"

    @property
    def stored(self) -> str:
        """Both headers as one text, for `parse_stored`."""
        return f"{self.traceparent} {self.state}" if self.state else self.traceparent


def parse_trace(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """The context that the two headers tell; None where the first is invalid. An invalid second
    one is left out."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return None
    return TraceContext(
        trace_id=found["trace"],
        span_id=found["parent"],
        is_sampled=bool(int(found["flags"], 16) & _SAMPLED),
        state=_valid_state(tracestate) if tracestate else "",
    )


def parse_stored(stored: str | None) -> TraceContext | None:
    """The inverse of `TraceContext.stored`; None for nothing, and for what a newer version wrote
    and this one does not know."""
    if not stored:
        return None
    traceparent, _, tracestate = stored.partition(" ")
    return parse_trace(traceparent, tracestate)


def _valid_state(tracestate: str) -> str:
    """The list without empty members; "" where it is invalid or longer than is handed on."""
    members = [member for part in tracestate.split(",") if (member := part.strip(" \t"))]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in matches if match is not None}
    text = ",".join(members)
    is_valid = len(keys) == len(members) <= STATE_MEMBERS_MAX
    return text if is_valid and len(text) <= STATE_MAX_CHARACTERS else ""
