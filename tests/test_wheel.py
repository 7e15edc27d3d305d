"""What is installed from the wheel carries its migrations and can migrate a database."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parent.parent
BUILD_DEADLINE_S = 90

READ_PACKAGED_SQL = """
import importlib.resources, rdev
folder = importlib.resources.files("rdev") / "sql"
for file in sorted(folder.iterdir(), key=lambda file: file.name):
    up, down = file.read_text().split("-- migrate:down")
    assert up.startswith("-- migrate:up"), file.name
    assert up.strip() and down.strip(), file.name
    print(file.name)
print(rdev.__file__)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with what is installed and without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    (built,) = folder.glob("rdev-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel alone; its dependencies are the environment's."""
    folder = tmp_path_factory.mktemp("installed")
    uv = Path(sys.executable).parent / "uv"
    options = ["--quiet", "--offline", "--no-deps", "--no-cache", "--python", sys.executable]
    _run([str(uv), "pip", "install", *options, "--target", str(folder), str(wheel)], cwd=ROOT)
    return folder


def _run(argv: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    ended = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        check=False,
        text=True,
        timeout=BUILD_DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_wheel_carries_every_migration_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    migrations = [f"rdev/sql/{path.name}" for path in sorted((ROOT / "sql").glob("*.sql"))]

    assert migrations
    assert [name for name in sorted(names) if name.startswith("rdev/sql/")] == migrations
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_carries_nothing_but_the_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"rdev"}


def test_an_installed_wheel_reads_its_own_migrations(installed: Path, tmp_path: Path) -> None:
    printed = _run(
        [sys.executable, "-c", READ_PACKAGED_SQL],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
    ).splitlines()

    assert printed[:-1] == sorted(path.name for path in (ROOT / "sql").glob("*.sql"))
    assert Path(printed[-1]).is_relative_to(installed)


def test_an_installed_wheel_migrates_a_database(
    installed: Path, tmp_path: Path, database_dsn: str
) -> None:
    _run(
        [sys.executable, "-m", "rdev", "migrate", "up"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "RDEV_DATABASE_DSN": database_dsn},
    )

    with psycopg.connect(database_dsn) as connection:
        applied = connection.execute("select version from schema_migrations order by 1").fetchall()
        tables = connection.execute(
            "select to_regclass('commands') is not null and to_regclass('output') is not null"
        ).fetchone()
    assert [version for (version,) in applied] == sorted(
        path.name.split("_")[0] for path in (ROOT / "sql").glob("*.sql")
    )
    assert tables == (True,)
