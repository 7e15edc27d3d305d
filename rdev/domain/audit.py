"""The audit log: who did what, when, from where, and with what outcome."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who asked for a change, in the words of an audit entry. `ip` is the client's address behind
    trusted proxies."""

    key_id: str
    key_name: str
    ip: str
    request_id: str
