"""The audit log: who did what, when, from where, and with what outcome."""

from collections.abc import Sequence
from dataclasses import dataclass

# What an entry's detail may hold of a text that is as long as a client likes.
DETAIL_BYTES = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asked for a change, in the words of an audit entry. `ip` is the client's address behind
    trusted proxies."""

    key_id: str
    key_name: str
    ip: str
    request_id: str


def shortened(argv: Sequence[str], most_bytes: int) -> list[str]:
    """The arguments from the first on, as far as `most_bytes` of UTF-8 hold them; what was cut off
    ends in `…`, arguments that are missing are one `…`."""
    kept: list[str] = []
    left_bytes = most_bytes
    for argument in argv:
        encoded = argument.encode("utf-8", "replace")
        if len(encoded) > left_bytes:
            return [*kept, encoded[:left_bytes].decode("utf-8", "ignore") + "…"]
        kept.append(argument)
        left_bytes -= len(encoded)
    return kept
