"""The roles of a database: its owner migrates, `rdev_app` serves (sql/0013_audit_seals.sql)."""

from psycopg.conninfo import conninfo_to_dict, make_conninfo

SERVER_ROLE = "rdev_app"


def as_server(dsn: str) -> str:
    """The same database in the role that serves, for a DSN whose user may take it on.

    It begins in the role; what is run by mistake (or smuggled in) cannot change the audit log. This
    is no wall against who holds the DSN: that is what a login of its own is for.
    """
    given = conninfo_to_dict(dsn)
    options = f"{given.get('options') or ''} -c role={SERVER_ROLE}".strip()
    return make_conninfo("", **(given | {"options": options}))
