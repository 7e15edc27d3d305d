"""Migrations against a real database; every test writes its own SQL folder."""

import hashlib
import threading
import uuid
from pathlib import Path

import psycopg
import pytest

from rdev.adapters.postgres import migrate
from rdev.adapters.postgres.migrate import MigrationState
from rdev.adapters.postgres.migration_files import Section, load, statements
from rdev.domain.errors import ErrorCode, RdevError

WORDS = """-- migrate:up
create table words (word text primary key);
insert into words values ('100%');
-- migrate:down
drop table words;
"""
LENGTHS = """-- migrate:up
alter table words add column length int;
-- migrate:down
alter table words drop column length;
"""
INDEXES = """-- migrate:up transaction:false
create index concurrently words_length on words (length);
create index concurrently words_word on words (word); -- the second; with a semicolon
-- migrate:down transaction:false
drop index concurrently words_length;
drop index concurrently words_word;
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "0001_words.sql", WORDS)
    write(tmp_path, "0002_lengths.sql", LENGTHS)
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def query(dsn: str, text: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(text.encode()).fetchall()


def execute(dsn: str, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(text.encode())


def states(dsn: str, folder: Path) -> list[tuple[str, MigrationState]]:
    return [(line.version, line.state) for line in migrate.status(dsn, folder=folder)]


def test_up_applies_what_is_pending_and_nothing_twice(database_dsn: str, folder: Path) -> None:
    assert migrate.up(database_dsn, folder=folder) == ["0001_words.sql", "0002_lengths.sql"]
    assert migrate.up(database_dsn, folder=folder) == []
    assert query(database_dsn, "select word, length from words") == [("100%", None)]


def test_up_stops_at_the_version_asked_for(database_dsn: str, folder: Path) -> None:
    assert migrate.up(database_dsn, "0001", folder=folder) == ["0001_words.sql"]
    assert migrate.up(database_dsn, "0001", folder=folder) == []
    with pytest.raises(RdevError, match="there is no migration 0009"):
        migrate.up(database_dsn, "0009", folder=folder)
    assert migrate.pending(database_dsn, folder=folder) == ["0002_lengths.sql"]


def test_the_book_holds_the_checksum_and_the_time(database_dsn: str, folder: Path) -> None:
    migrate.up(database_dsn, "0001", folder=folder)
    digest = hashlib.sha256((folder / "0001_words.sql").read_bytes()).hexdigest()
    book = query(
        database_dsn,
        "select version, checksum, applied_at > now() - interval '1 hour' from schema_migrations",
    )
    assert book == [("0001", digest, True)]


def test_down_takes_back_the_newest_first(database_dsn: str, folder: Path) -> None:
    migrate.up(database_dsn, folder=folder)
    assert migrate.down(database_dsn, folder=folder) == ["0002_lengths.sql"]
    assert states(database_dsn, folder) == [
        ("0001", MigrationState.APPLIED),
        ("0002", MigrationState.PENDING),
    ]
    assert migrate.down(database_dsn, 5, folder=folder) == ["0001_words.sql"]
    assert query(database_dsn, "select to_regclass('words')") == [(None,)]


def test_down_refuses_a_migration_without_a_way_back(database_dsn: str, tmp_path: Path) -> None:
    write(tmp_path, "0001_words.sql", "-- migrate:up\ncreate table words (word text);\n")
    migrate.up(database_dsn, folder=tmp_path)
    with pytest.raises(RdevError, match=r"0001_words.sql has no way back") as caught:
        migrate.down(database_dsn, folder=tmp_path)
    assert caught.value.code is ErrorCode.CONFLICT


def test_status_and_pending_leave_a_fresh_database_untouched(
    database_dsn: str, folder: Path
) -> None:
    assert states(database_dsn, folder) == [
        ("0001", MigrationState.PENDING),
        ("0002", MigrationState.PENDING),
    ]
    with psycopg.connect(database_dsn) as connection:
        names = migrate.pending(connection, folder=folder)
    assert names == ["0001_words.sql", "0002_lengths.sql"]
    assert query(database_dsn, "select to_regclass('schema_migrations')") == [(None,)]


def test_verify_says_what_to_run_until_everything_is_applied(
    database_dsn: str, folder: Path
) -> None:
    with pytest.raises(RdevError, match="is not applied: run `rdev migrate up`") as e:
        migrate.verify(database_dsn, folder=folder)
    assert e.value.code is ErrorCode.SERVICE_UNAVAILABLE
    migrate.up(database_dsn, folder=folder)
    migrate.verify(database_dsn, folder=folder)


def test_a_database_of_no_encoding_is_migrated_and_verified(admin_dsn: str, folder: Path) -> None:
    """What `initdb` makes where no locale is set: everything it answers is bytes otherwise."""
    name = f"ascii_{uuid.uuid4().hex[:16]}"
    execute(admin_dsn, f"create database {name} template template0 encoding sql_ascii locale 'C'")
    try:
        dsn = psycopg.conninfo.make_conninfo(admin_dsn, dbname=name)
        migrate.up(dsn, folder=folder)
        assert migrate.up(dsn, folder=folder) == []
        migrate.verify(dsn, folder=folder)
    finally:
        execute(admin_dsn, f"drop database {name}")


def test_an_edited_file_stops_everything_before_it_starts(database_dsn: str, folder: Path) -> None:
    migrate.up(database_dsn, "0001", folder=folder)
    write(folder, "0001_words.sql", WORDS + "-- a thought\n")
    for operation in (migrate.up, migrate.down, migrate.verify):
        with pytest.raises(RdevError, match=r"0001_words.sql was edited after it was applied") as e:
            operation(database_dsn, folder=folder)
        assert e.value.code is ErrorCode.CONFLICT
    assert migrate.pending(database_dsn, folder=folder) == ["0002_lengths.sql"]


def test_a_file_numbered_below_an_applied_one_is_refused(database_dsn: str, folder: Path) -> None:
    (folder / "0002_lengths.sql").rename(folder / "0003_lengths.sql")
    migrate.up(database_dsn, folder=folder)
    write(folder, "0002_late.sql", "-- migrate:up\nselect 1;\n")
    with pytest.raises(RdevError, match=r"0002_late.sql comes before a version that is applied"):
        migrate.up(database_dsn, folder=folder)
    assert states(database_dsn, folder)[1] == ("0002", MigrationState.OUT_OF_ORDER)
    # The way out by hand stays open.
    assert migrate.down(database_dsn, folder=folder) == ["0003_lengths.sql"]


def test_a_newer_database_is_refused_by_the_runner_but_ready_to_serve(
    database_dsn: str, folder: Path
) -> None:
    migrate.up(database_dsn, folder=folder)
    (folder / "0002_lengths.sql").unlink()
    for operation in (migrate.up, migrate.down, migrate.verify):
        with pytest.raises(RdevError, match="version 0002 is applied but this build has no file"):
            operation(database_dsn, folder=folder)
    assert migrate.pending(database_dsn, folder=folder) == []


def test_a_failing_migration_is_rolled_back_and_its_line_is_named(
    database_dsn: str, folder: Path
) -> None:
    write(
        folder,
        "0003_broken.sql",
        "-- migrate:up\ncreate table half (a int);\n\nselect nonsense from half;\n",
    )
    with pytest.raises(RdevError, match=r"0003_broken.sql, line 4: .*nonsense.* rolled back") as e:
        migrate.up(database_dsn, folder=folder)
    assert e.value.code is ErrorCode.CONFLICT
    assert query(database_dsn, "select to_regclass('half')") == [(None,)]
    # What came before it stays applied.
    assert migrate.pending(database_dsn, folder=folder) == ["0003_broken.sql"]


def test_statements_without_a_transaction_run_one_by_one_and_say_what_stays(
    database_dsn: str, folder: Path
) -> None:
    write(folder, "0003_indexes.sql", INDEXES)
    migrate.up(database_dsn, folder=folder)
    assert query(database_dsn, "select to_regclass('words_word')::text") == [("words_word",)]
    migrate.down(database_dsn, folder=folder)
    assert query(database_dsn, "select to_regclass('words_length')") == [(None,)]
    broken = INDEXES.replace("words_word on words (word)", "words_word on words (nothing)")
    write(folder, "0003_indexes.sql", broken)
    with pytest.raises(RdevError, match=r"line 3: .*nothing.* put them right by hand"):
        migrate.up(database_dsn, folder=folder)
    assert query(database_dsn, "select to_regclass('words_length')::text") == [("words_length",)]


def test_racing_runners_apply_concurrent_indexes_once_without_deadlock(
    database_dsn: str, folder: Path
) -> None:
    write(folder, "0003_indexes.sql", INDEXES)
    applied: list[list[str]] = []
    errors: list[RdevError] = []

    def run() -> None:
        try:
            applied.append(migrate.up(database_dsn, folder=folder))
        except RdevError as error:
            errors.append(error)

    racers = [threading.Thread(target=run) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert errors == []
    assert sorted(len(names) for names in applied) == [0, 0, 0, 3]


def test_a_runner_gives_up_when_another_keeps_the_turn(database_dsn: str, folder: Path) -> None:
    with psycopg.connect(database_dsn) as other:
        other.execute("select pg_advisory_lock(%s)", [migrate.LOCK_KEY])
        with pytest.raises(RdevError, match="another rdev has been migrating") as caught:
            migrate.up(database_dsn, folder=folder, lock_wait_s=0.0)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert caught.value.retry_after_s is not None


def test_a_table_in_use_gives_up_early_and_changes_nothing(
    database_dsn: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "TABLE_LOCK_TIMEOUT_S", 0.05)
    migrate.up(database_dsn, "0001", folder=folder)
    with psycopg.connect(database_dsn) as reader:
        reader.execute("select * from words")
        with pytest.raises(RdevError, match="for a table that is in use") as caught:
            migrate.up(database_dsn, folder=folder)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert migrate.up(database_dsn, folder=folder) == ["0002_lengths.sql"]


def test_a_statement_has_a_time_limit(
    database_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "STATEMENT_TIMEOUT_S", 0.05)
    write(tmp_path, "0001_slow.sql", "-- migrate:up\nselect pg_sleep(60);\n")
    with pytest.raises(RdevError, match=r"0001_slow.sql: .*statement timeout"):
        migrate.up(database_dsn, folder=tmp_path)


def test_a_table_that_dbmate_made_is_taken_over(database_dsn: str, folder: Path) -> None:
    execute(
        database_dsn,
        "create table schema_migrations (version varchar(128) primary key);"
        "insert into schema_migrations values ('0001');"
        "create table words (word text primary key);",
    )
    assert states(database_dsn, folder)[0] == ("0001", MigrationState.APPLIED)
    assert migrate.up(database_dsn, folder=folder) == ["0002_lengths.sql"]
    migrate.verify(database_dsn, folder=folder)


def test_a_database_out_of_reach_is_unavailable_and_keeps_its_password(folder: Path) -> None:
    dsn = "host=127.0.0.1 port=1 user=u password=hunter2 dbname=d"
    with pytest.raises(RdevError, match="cannot be used for migrations") as caught:
        migrate.status(dsn, folder=folder)
    assert caught.value.code is ErrorCode.SERVICE_UNAVAILABLE
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("1_words.sql", WORDS, "its name is not of the form"),
        ("0001_words.sql", "create table a (a int);", "SQL before `-- migrate:up`"),
        ("0001_words.sql", "-- nothing yet\n", "no line `-- migrate:up`"),
        ("0001_words.sql", "-- migrate:up transaction:maybe\n", "is not known"),
        ("0001_words.sql", "-- migrate:up\n-- migrate:up\n", "twice"),
        ("0001_words.sql", "-- migrate:sideways\n", "is not known"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    write(tmp_path, name, text)
    with pytest.raises(RdevError, match=sentence) as caught:
        load(tmp_path)
    assert caught.value.code is ErrorCode.CONFLICT


def test_two_files_with_one_version_are_refused(folder: Path) -> None:
    write(folder, "0002_other.sql", LENGTHS)
    with pytest.raises(RdevError, match=r"0002_lengths.sql and 0002_other.sql have the same"):
        load(folder)


def test_a_missing_folder_is_not_taken_for_no_migrations(tmp_path: Path) -> None:
    with pytest.raises(RdevError, match="there is no migrations folder"):
        load(tmp_path / "sql")


def test_files_with_carriage_returns_and_a_readme_beside_are_read(tmp_path: Path) -> None:
    (tmp_path / "0001_words.sql").write_bytes(WORDS.replace("\n", "\r\n").encode())
    (tmp_path / "README.md").write_text("about")
    (migration,) = load(tmp_path)
    assert migration.down is not None
    assert migration.down.sql.split() == ["drop", "table", "words;"]


def test_only_a_semicolon_between_statements_divides_them() -> None:
    text = """
select ';', E'\\';', ";" /* ; */ from a; -- ;
create function f() returns int language plpgsql as $body$ begin; return 1; end $body$;
do $$ begin perform 1; end $$;
-- the end;
"""
    section = Section(sql=text, line=10, transaction=False)
    found = [(part.line, part.sql.strip().splitlines()[-1][:9]) for part in statements(section)]
    assert found == [(11, "select ';"), (12, "create fu"), (13, "do $$ beg")]
