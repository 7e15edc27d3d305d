"""Migration files as dbmate writes them: `NNNN_what.sql` with an up and a down section.

    -- migrate:up
    create table words (word text primary key);
    -- migrate:down
    drop table words;

`transaction:false` after `up` or `down` runs that section statement by statement outside a
transaction (for CREATE INDEX CONCURRENTLY). Reads files, knows no database. Source: dbmate, README,
"Creating Migrations" and "Migration Options".
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from itertools import pairwise

from rdev.domain.errors import ErrorCode, RdevError

_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_MARKER = re.compile(r"^--[ \t]*migrate:(\S+)[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)
_OPTIONS = {"": True, "transaction:true": True, "transaction:false": False}

# What may hold a semicolon that ends nothing: comments, strings (E'' with backslashes first), names
# and dollar quotes. Anything else goes one character at a time.
_TOKEN = re.compile(
    r"--[^\n]*|/\*.*?\*/"
    r"|\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\""
    r"|\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$"
    r"|\w+|.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """SQL of one direction. `line` is where it begins in its file (from 1)."""

    sql: str
    line: int
    transaction: bool

    def line_of(self, position: int) -> int:
        """The file's line for a character position in the SQL (from 1, as PostgreSQL counts)."""
        return self.line + self.sql.count("\n", 0, position - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One file. `checksum`: the SHA-256 of its bytes in hex; `down` None: no way back."""

    version: str
    name: str
    checksum: str
    up: Section
    down: Section | None


def is_migration(entry: Traversable) -> bool:
    """Whether the entry claims to be a migration; other files (a README) may stand beside."""
    return entry.name.endswith(".sql") and entry.is_file()


def load(folder: Traversable) -> list[Migration]:
    """All migrations of the folder, oldest first.

    Errors: CONFLICT naming the file that has a wrong name, a version used twice or a faulty text;
    SERVICE_UNAVAILABLE when there is no such folder (a broken installation).
    """
    if not folder.is_dir():
        message = f"there is no migrations folder {folder}; install rdev again"
        raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, message)
    entries = sorted(filter(is_migration, folder.iterdir()), key=lambda entry: entry.name)
    migrations = [_parse(entry.name, entry.read_bytes()) for entry in entries]
    for before, after in pairwise(migrations):
        if before.version == after.version:
            message = f"{before.name} and {after.name} have the same version; number one anew"
            raise RdevError(ErrorCode.CONFLICT, message)
    return migrations


def statements(section: Section) -> Iterator[Section]:
    """The statements of a section, one by one, each with its line; comments alone are none."""
    start: int | None = None
    for token in _TOKEN.finditer(section.sql):
        text = token[0]
        if text == ";":
            if start is not None:
                yield _part(section, start, token.start())
            start = None
        elif start is None and not text.isspace() and not text.startswith(("--", "/*")):
            start = token.start()
    if start is not None:
        yield _part(section, start, len(section.sql))


def _part(section: Section, start: int, end: int) -> Section:
    line = section.line_of(start + 1)
    return Section(sql=section.sql[start:end], line=line, transaction=section.transaction)


def _parse(name: str, content: bytes) -> Migration:
    match = _NAME.fullmatch(name)
    if match is None:
        raise _faulty(name, "its name is not of the form 0001_what.sql")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _faulty(name, "it is not UTF-8") from error
    sections = _sections(name, text)
    if "up" not in sections:
        raise _faulty(name, "it has no line `-- migrate:up`")
    return Migration(
        version=match[1],
        name=name,
        checksum=hashlib.sha256(content).hexdigest(),
        up=sections["up"],
        down=sections.get("down"),
    )


def _sections(name: str, text: str) -> dict[str, Section]:
    markers = list(_MARKER.finditer(text))
    head = text[: markers[0].start()] if markers else text
    if any(statements(Section(sql=head, line=1, transaction=True))):
        raise _faulty(name, "it has SQL before `-- migrate:up`, which would never run")
    sections: dict[str, Section] = {}
    ends = [marker.start() for marker in markers[1:]] + [len(text)] * bool(markers)
    for marker, end in zip(markers, ends, strict=True):
        direction, option = marker[1], marker[2]
        if direction not in ("up", "down") or direction in sections or option not in _OPTIONS:
            raise _faulty(name, f"`{marker[0].strip()}` is not known or stands there twice")
        sections[direction] = Section(
            sql=text[marker.end() : end],
            line=text.count("\n", 0, marker.end()) + 1,
            transaction=_OPTIONS[option],
        )
    return sections


def _faulty(name: str, why: str) -> RdevError:
    return RdevError(ErrorCode.CONFLICT, f"migration {name} cannot be used: {why}")
