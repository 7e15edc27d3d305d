"""The house stands as drawn: import rules, sizes, docstrings, and what no file may hold.

What ruff, mypy and import-linter say themselves is theirs; the tests here hold what those cannot
see, and that their rules catch what they are meant to catch.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent

LINES_MAX = 600
# A character class in each keeps this file out of its own search.
REGISTRY_HOSTS = re.compile(
    r"py[p]i[.]org|python[h]osted|deb[.]deb[i]an|registry[.]npm[j]s|proxy[.]gol[a]ng|cr[a]tes[.]io"
)
MACHINE_PATHS = re.compile(r"/(?:wo[r]k|fa[r]m|ro[o]t|tm[p])/[A-Za-z]")
SHIELD_REASON = "# shielded:"


def _sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TOOLS / "lint-imports", "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=False,
        text=True,
    )


def _ruff(source: str, filename: str) -> str:
    checked = subprocess.run(
        [TOOLS / "ruff", "check", "--stdin-filename", filename, "--output-format=concise", "-"],
        cwd=ROOT,
        input=source,
        capture_output=True,
        check=False,
        text=True,
    )
    return checked.stdout


@pytest.mark.slow
def test_imports_run_one_way() -> None:
    found = _lint_imports(ROOT)

    assert found.returncode == 0, found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("services/intruder.py", "import rdev.adapters.postgres", "rooms"),
        ("ports/intruder.py", "import rdev.services", "rooms"),
        ("adapters/postgres/intruder.py", "import rdev.config", "rooms"),
        ("domain/intruder.py", "import trio", "the domain is pure"),
        ("services/intruder.py", "import psycopg", "services and ports know no vendor"),
        ("adapters/http/intruder.py", "import psycopg", "psycopg only in adapters.postgres"),
        ("adapters/http/intruder.py", "import rdev.adapters.postgres", "adapters are independent"),
        ("adapters/webhooks/intruder.py", "import rdev.adapters.http", "adapters are independent"),
        ("domain/intruder.py", "import cryptography", "the domain is pure"),
        (
            "adapters/telemetry/intruder.py",
            "import h2",
            "frames of HTTP/2 only in adapters.http and adapters.webhooks",
        ),
        (
            "adapters/http/intruder.py",
            "import httpcore2",
            "connections below HTTP only in adapters.webhooks and adapters.kubernetes",
        ),
        (
            "adapters/execution/intruder.py",
            "import wsproto",
            "lightkube and wsproto only in adapters.kubernetes",
        ),
        (
            "adapters/execution/intruder.py",
            "import rdev.adapters.kubernetes.exec",
            "adapters are independent",
        ),
    ],
)
def test_a_broken_import_rule_is_caught(
    tmp_path: Path, file: str, line: str, contract: str
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "rdev", tmp_path / "rdev", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rdev" / file).write_text(f'"""Breaks a rule."""\n\n{line}\n')

    found = _lint_imports(tmp_path)

    assert found.returncode == 1
    assert f"{contract} BROKEN" in found.stdout


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio",
        "import anyio",
        "from unittest.mock import Mock",
        "import datetime\n\ndatetime.datetime.now()",
        "import time\n\ntime.time()",
        "import time\n\ntime.sleep(1)",
        "from opentelemetry.sdk import trace",
    ],
)
def test_what_a_room_may_not_ask_for_is_caught(source: str) -> None:
    assert "TID251" in _ruff(source, "rdev/services/intruder.py")


@pytest.mark.parametrize("path", _sources("rdev"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize(
    "path", _sources("rdev", "bench"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_shield_says_why() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _sources("rdev")
        for line in _silent_shields(path.read_text())
    ]

    assert silent == []


def test_a_shield_without_a_reason_is_seen() -> None:
    with_reason = (
        "# shielded: because\n# of this\nwith trio.CancelScope(\n    shield=True\n):\n    pass\n"
    )
    without = with_reason.replace(SHIELD_REASON, "# hidden:")

    assert list(_silent_shields(with_reason)) == []
    assert list(_silent_shields(without)) == [3]
    assert list(_silent_shields("scope.shield = True\n")) == [1]


def _silent_shields(source: str) -> Iterator[int]:
    """Lines of the statements that shield without `# shielded: why` right above them."""
    lines = source.splitlines()
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.stmt) or not _shields(statement):
            continue
        above = statement.lineno - 2
        while above >= 0 and lines[above].lstrip().startswith("#"):
            if lines[above].lstrip().startswith(SHIELD_REASON):
                break
            above -= 1
        else:
            yield statement.lineno


def _shields(statement: ast.stmt) -> bool:
    """Whether the statement's own expressions (not those of its body) set a shield."""
    if isinstance(statement, ast.Assign):
        targets = [target for target in statement.targets if isinstance(target, ast.Attribute)]
        if any(target.attr == "shield" for target in targets) and _is_true(statement.value):
            return True
    own = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    return any(
        isinstance(node, ast.keyword) and node.arg == "shield" and _is_true(node.value)
        for child in own
        if not isinstance(child, ast.ExceptHandler | ast.match_case)
        for node in ast.walk(child)
    )


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def test_whoever_catches_everything_says_why() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _sources("rdev")
        for line in _catching_everything(path.read_text())
    ]

    assert silent == []


def test_catching_everything_without_a_reason_is_seen() -> None:
    body = "try:\n    pass\n{}\n    pass\n"

    for clause in (
        "except",
        "except Exception",
        "except* Exception",
        "except (OSError, Exception)",
    ):
        assert list(_catching_everything(body.format(f"{clause}:"))) == [3]
        assert list(_catching_everything(body.format(f"{clause}:  # noqa: BLE001"))) == [3]
        assert list(_catching_everything(body.format(f"{clause}:  # noqa: BLE001  # why"))) == []
    assert list(_catching_everything(body.format("except OSError as error:"))) == []


def _catching_everything(source: str) -> Iterator[int]:
    """Lines of the handlers that take every exception without saying why: only a subsystem's loop
    may, where one fault must not end all others (`# noqa: BLE001  # why`), and who raises another
    in its place (`# why`)."""
    lines = source.splitlines()
    for handler in ast.walk(ast.parse(source)):
        if isinstance(handler, ast.ExceptHandler):
            names = [] if handler.type is None else list(ast.walk(handler.type))
            takes_all = any(isinstance(n, ast.Name) and n.id == "Exception" for n in names)
            has_reason = re.search(r"# (?:noqa: BLE001  # )?(?!noqa)\w", lines[handler.lineno - 1])
            if (takes_all or not names) and not has_reason:
                yield handler.lineno


def test_no_tracked_file_names_a_registry_or_a_machine() -> None:
    naming = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in _tracked()
        for pattern in (REGISTRY_HOSTS, MACHINE_PATHS)
        if (hit := pattern.search(path.read_text(errors="replace"))) is not None
    ]

    assert naming == []


@pytest.mark.parametrize("name", ["runtime.txt", "dev.txt"])
def test_the_locks_pin_everything_by_hash_and_name_no_address(name: str) -> None:
    text = (ROOT / "requirements" / name).read_text()
    pins = re.split(r"\n(?=[A-Za-z0-9])", text.strip())

    assert "://" not in text
    assert [
        pin for pin in pins if not re.match(r"[\w.\[\],-]+==", pin) or "--hash=" not in pin
    ] == []


def test_git_ignores_what_holds_secrets_and_state() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = ["secrets.yaml", "deploy/secrets.yaml", ".rdev/admin-key", ".venv/bin/rdev"]

    ignored = subprocess.run(
        ["git", "check-ignore", *names], cwd=ROOT, capture_output=True, check=False, text=True
    )

    assert ignored.stdout.split() == names


def test_the_glossary_defines_every_word_of_the_architecture() -> None:
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    words_line = next(line for line in architecture.splitlines() if line.startswith("command · "))
    words = [word.strip() for word in re.split(r"[·,]", words_line)]
    defined = {
        word
        for row in re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)
        for word in row.split(", ")
    }

    assert [word for word in words if word not in defined] == []
