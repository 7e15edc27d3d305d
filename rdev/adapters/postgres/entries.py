"""The audit entry of a change, as a part of the statement that makes the change."""

from collections.abc import Mapping

from psycopg.types.json import Jsonb

from rdev.domain.audit import Action, Actor

# To be followed by where the change is, as in `from made`: no change, no entry.
ENTRY = """
    insert into audit_entries (actor, actor_name, ip, request_id, action, target, project, detail)
    select %(audit_actor)s, %(audit_name)s, %(audit_ip)s, %(audit_request)s, %(audit_action)s,
           %(audit_target)s, %(audit_project)s, %(audit_detail)s
"""


def entry_parameters(
    actor: Actor,
    action: Action,
    target: str,
    *,
    project: str | None = None,
    detail: Mapping[str, object],
) -> dict[str, object]:
    """What `ENTRY` needs. `detail` is plain JSON and holds nothing secret."""
    return {
        "audit_actor": actor.key_id,
        "audit_name": actor.key_name,
        "audit_ip": actor.ip,
        "audit_request": actor.request_id,
        "audit_action": action,
        "audit_target": target,
        "audit_project": project,
        "audit_detail": Jsonb(detail),
    }
