"""Secrets that are taken out of what is shown, and what is left as it is."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdev.domain.redaction import (
    REDACTED,
    is_secret_name,
    redact_argv,
    redact_text,
    secret_values,
)

LETTERS = string.ascii_letters + string.digits
SECRET = st.text(LETTERS, min_size=36, max_size=60)
# What may stand around a secret in a script.
WORDS = st.lists(st.text(string.ascii_lowercase + "/.-$", max_size=8), max_size=4).map(" ".join)

TEMPLATES = [
    "--password={}",
    "--password {}",
    "PASSWORD={}",
    "DB_PASS='{}'",
    'export GITHUB_TOKEN="{}"',
    "curl -H 'Authorization: Bearer {}'",
    "curl -H 'authorization: token {}'",
    'curl -H "X-API-Key: {}"',
    "curl -H 'Cookie: a=b; session={}'",
    "curl -u me:{} https://x",
    "--cookie={}",
    "SESSION_COOKIE={}",
    "git clone https://me:{}@github.com/a/b",
    "git clone https://{}@github.com/a/b",
    "psql postgresql://me:{}@db/x",
    '{{"api_key": "{}"}}',
    "aws_secret_access_key = {}",
    "ghp_{}",
    "glpat-{}",
    "sk-ant-api03-{}",
    "rdev_sk_{}",
    "xoxb-{}",
    "https://x/?access_token={}&page=1",
    "mysql --passphrase={}",
]


@pytest.mark.parametrize("scheme", ["bearer", "Basic", "digest"])
def test_a_name_after_the_word_for_a_scheme_is_no_token(scheme: str):
    assert redact_text(f"{scheme} DB_PASS='a1b2'") == f"{scheme} DB_PASS={REDACTED}"


@pytest.mark.parametrize("template", TEMPLATES)
@given(secret=SECRET, before=WORDS, after=WORDS)
def test_a_secret_in_a_script_is_taken_out(template: str, secret: str, before: str, after: str):
    text = f"{before} {template.format(secret)} {after}"
    assert secret not in redact_text(text)
    assert secret not in " ".join(redact_argv(("sh", "-c", text)))


@given(
    value=st.text(min_size=8, max_size=40), before=st.text(max_size=20), after=st.text(max_size=20)
)
def test_a_known_value_is_taken_out_wherever_it_stands(value: str, before: str, after: str):
    shown = redact_argv(("sh", "-c", f"{before}{value}{after}"), [value])
    assert value not in shown[2] or value in REDACTED * 2


@given(argv=st.lists(st.text(max_size=40), max_size=6))
def test_there_are_as_many_arguments_as_before(argv: list[str]):
    assert len(redact_argv(argv)) == len(argv)


@given(template=st.sampled_from(TEMPLATES), secret=SECRET, before=WORDS, after=st.text(max_size=30))
def test_again_changes_nothing(template: str, secret: str, before: str, after: str):
    once = redact_text(f"{before} {template.format(secret)} {after}")
    assert redact_text(once) == once


@given(value=st.text(min_size=1, max_size=30).filter(lambda value: not value.startswith("-")))
def test_the_argument_of_an_option_is_a_value_to_its_end(value: str):
    assert redact_argv(("tool", "--password", value)) == ("tool", "--password", REDACTED)
    assert redact_argv(("tool", f"--token={value}")) == ("tool", f"--token={REDACTED}")
    assert redact_argv(("tool", f"API_KEY={value}")) == ("tool", f"API_KEY={REDACTED}")


@pytest.mark.parametrize(
    "text",
    [
        "make test -j4",
        "git commit --author='Zoe <zoe@example.org>' -m 'Add tokens'",
        "claude --max-tokens 500",
        "ls /usr/share/keyrings",
        "git clone https://github.com/a/b.git",
        "git clone ssh://git@github.com/a/b.git",
        "git clone git@github.com:a/b.git",
        "echo user: me",
        "npm run build -- --user me",
        "mkdir -p a/b",
        "cat keyboard=qwerty",
        "PWD=/work make",
        "psql postgresql://db.example.org:5432/x",
        "bypass=1 make",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert redact_text(text) == text
    assert redact_argv(("sh", "-c", text)) == ("sh", "-c", text)


def test_only_the_secret_goes():
    shown = redact_text(
        "curl -H 'Authorization: Bearer abcdef123456' https://me:pw@x/y?token=1&a=2"
    )
    assert shown == (
        f"curl -H 'Authorization: Bearer {REDACTED}' https://me:{REDACTED}@x/y?token={REDACTED}&a=2"
    )


def test_a_private_key_goes_as_a_whole():
    text = "a\n-----BEGIN OPENSSH PRIVATE KEY-----\nabc\ndef\n-----END OPENSSH PRIVATE KEY-----\nb"
    assert redact_text(text) == f"a\n{REDACTED}\nb"


def test_names_of_secrets_are_known():
    for name in ("GITHUB_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "api-key", "DB_PASS"):
        assert is_secret_name(name), name
    for name in ("PATH", "AUTHOR", "MAX_TOKENS", "KEYBOARD", "HOME", "PWD", "COMPASS"):
        assert not is_secret_name(name), name


def test_the_values_of_secret_variables_are_known():
    assert secret_values({"A": "b", "MY_TOKEN": "value of it"}) == ["value of it"]


@pytest.mark.timeout(30)  # minutes, before every repetition in the patterns had a bound
@pytest.mark.parametrize(
    "unit", ["-token", "secret.", "-eyJ", "a.b-", 'token="', "-u ", "https://a:"]
)
def test_no_text_takes_long(unit: str):
    text = unit * (100_000 // len(unit))
    redact_argv(("sh", "-c", text, text + "="))


@pytest.mark.parametrize("name", ["COOKIE", "session_cookie", "Set-Cookie", "authorization"])
def test_a_cookie_is_a_secret_by_its_name(name: str) -> None:
    secret = "d41d8cd98f00b204"
    assert is_secret_name(name)
    assert secret not in " ".join(redact_argv([f"--{name}", secret]))
    assert secret not in " ".join(redact_argv([f"{name}={secret}"]))
    assert secret_values({name: secret}) == [secret]
