"""Routes of the audit log. Only what is sealed is shown: an entry is there about a second after its
change."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime

from quart import Blueprint, Response

from rdev.adapters.http import schemas
from rdev.adapters.http.describe import Answer, Described, Description, moment, whole, word
from rdev.adapters.http.envelope import stream, success
from rdev.adapters.http.exchange import hold, principal
from rdev.adapters.http.query import PAGE, cursor_of, limit_of, moment_of, whole_of, word_of
from rdev.adapters.http.wire import encode
from rdev.domain.audit import AuditFilter, SealedEntry
from rdev.domain.audit_chain import Verdict
from rdev.ports.audit import AuditLog
from rdev.services.audit_verify import AuditVerifier

# One call of `/audit/verify` takes some ten seconds at most.
VERIFY_DEFAULT = 500_000
VERIFY_MAX = 1_000_000
# How many seals one read of the export looks at.
EXPORT_SEALS = 1_000
_SEQ_MAX = 2**63 - 1

_WANTED = (
    word("actor", "only entries of this key"),
    word("action", "only these"),
    word("project", "only of this project"),
    moment("since", "from this moment on"),
    moment("until", "before this moment"),
)
_AFTER_SEQ = whole("after", "behind this `seq`", least=0, most=_SEQ_MAX)

DESCRIBED: Described = {
    ("GET", "/audit"): Description(
        summary="What happened and who did it",
        tag="audit",
        parameters=(*PAGE, *_WANTED),
        answers={200: Answer(about="newest first", schema=schemas.AUDIT_ENTRY, is_page=True)},
    ),
    ("GET", "/audit/export"): Description(
        summary="The whole log",
        tag="audit",
        parameters=(_AFTER_SEQ, *_WANTED),
        answers={
            200: Answer(
                about="an entry a line, with all that its hash is over",
                schema=schemas.TEXT,
                content_type="application/x-ndjson",
                is_enveloped=False,
            )
        },
    ),
    ("GET", "/audit/verify"): Description(
        summary="Compute the chain again",
        tag="audit",
        parameters=(
            _AFTER_SEQ,
            whole("limit", "seals looked at", least=1, most=VERIFY_MAX),
        ),
        answers={200: Answer(about="what was found", schema=schemas.VERDICT)},
    ),
}


def audit_routes(audit: AuditLog, verifier: AuditVerifier) -> Blueprint:
    """`/audit`. A key that is limited to projects sees the entries of these alone."""
    routes = Blueprint("audit", __name__)

    @routes.get("/audit")
    async def list_entries() -> Response:
        limit = limit_of()
        cursor = cursor_of(_is_seq)
        before = None if cursor is None else int(cursor)
        page = await audit.page(_filter(), before=before, limit=limit)
        more = None if page.before is None else str(page.before)
        return success([_shown(entry) for entry in page.entries], next_cursor=more)

    @routes.get("/audit/export")
    async def export_entries() -> Response:
        after = whole_of("after", least=0, most=_SEQ_MAX) or 0
        return stream(_exported(audit, _filter(), after), content_type="application/x-ndjson")

    @routes.get("/audit/verify")
    async def verify() -> Response:
        after = whole_of("after", least=0, most=_SEQ_MAX) or 0
        limit = whole_of("limit", least=1, most=VERIFY_MAX) or VERIFY_DEFAULT
        hold()
        return success(_verdict(await verifier.verify(after=after, limit=limit)))

    return routes


async def _exported(
    audit: AuditLog, wanted: AuditFilter, after: int
) -> AsyncGenerator[bytes, None]:
    """Every sealed entry in order, a line each, up to what was sealed when it began."""
    bounds = await audit.bounds()
    first, last = bounds or (1, 0)
    at = max(after, first - 1)
    while at < last:
        found = await audit.read(wanted, after=at, limit=min(EXPORT_SEALS, last - at))
        at += EXPORT_SEALS
        lines = b"".join(encode(_exported_line(entry)) + b"\n" for entry in found)
        if lines:
            yield lines


def _filter() -> AuditFilter:
    return AuditFilter(
        actor=word_of("actor"),
        action=word_of("action"),
        project=word_of("project"),
        since=moment_of("since"),
        until=moment_of("until"),
        within=principal().project_ids,
    )


def _shown(sealed: SealedEntry) -> dict[str, object]:
    """An entry as clients see it."""
    entry = sealed.entry
    return {
        "seq": sealed.seq,
        "at": entry.at,
        "actor": {"id": entry.actor, "name": entry.actor_name},
        "ip": entry.ip,
        "request_id": entry.request_id,
        "action": entry.action,
        "target": entry.target,
        "project": entry.project,
        "outcome": entry.outcome,
        "detail": entry.detail,
        "hash": sealed.hash.hex(),
        "prev_hash": None if sealed.prev_hash is None else sealed.prev_hash.hex(),
    }


def _exported_line(sealed: SealedEntry) -> dict[str, object]:
    """All that the hash is over, so that it can be computed again: `at` to the microsecond."""
    entry = sealed.entry
    return _shown(sealed) | {
        "at": _exact(entry.at),
        "day": entry.day.isoformat(),
        "id": entry.id,
        "xid": str(entry.xid),
    }


def _exact(at: datetime) -> str:
    text = at.astimezone(UTC).isoformat(timespec="microseconds")
    return text.removesuffix("+00:00") + "Z"


def _verdict(verdict: Verdict) -> dict[str, object]:
    fault = verdict.fault
    return {
        "valid": fault is None,
        "checked": verdict.checked,
        "last_seq": verdict.last.seq,
        "last_hash": verdict.last.hash.hex(),
        "more": verdict.more,
        "fault": None
        if fault is None
        else {"kind": fault.kind, "seq": fault.seq, "message": fault.message},
    }


def _is_seq(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= _SEQ_MAX
