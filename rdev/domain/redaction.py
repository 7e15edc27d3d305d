"""Taking secrets out of what is shown, stored and logged: by shape, by name, by value.

This is a net, not a wall: a secret that looks like nothing and stands behind no name is seen as the
text it is. What must not be read by who may read a project's commands belongs into `env` or
`stdin`, which are shown nowhere. Applied to the `argv` of commands (shown, stored, audited) and to
log lines.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

REDACTED = "[redacted]"
# Shorter values are words that occur by chance.
VALUE_CHARACTERS_MIN = 8

# What the name of a secret has in it. `tokens` are counted, `author` is a person. No longer than
# names are, so that no text takes long.
_NAME = (
    r"[\w.-]{0,64}?(?:passw(?:or)?d|passphrase|secret|token(?!s)|credential"
    r"|(?:api|access|private|signing|encryption|session|auth)[_-]?key"
    r"|(?<![a-z])(?:pass|auth)(?![a-z]))[\w.-]{0,64}"
)
# These have patterns of their own in a text, because their values have blanks in them.
_ANY_NAME = rf"(?:{_NAME}|[\w.-]{{0,64}}?(?:cookie|authorization)[\w.-]{{0,64}})"
# A value in a text: in quotes, or up to a blank or to what ends a word of a shell or a query; and
# what is glued to it.
_VALUE = (
    r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|["']|(?=[^\s&|;<>)]))[^\s&|;<>)"']*"""
    r"""(?:["'][^\s&|;<>)"'},]+)*"""
)

# Anything that one of the patterns below could begin with: most texts have none of it.
_HINTS = (
    "pass", "secret", "token", "credential", "cookie", "key", "auth", "bearer", "basic", "digest",
    "://", "private", "-u", "user", "sk-", "sk_", "gh", "glpat", "akia", "asia", "xox", "aiza",
    "eyj", "npm_", "pypi-", "hf_", "dckr_", "whs",
)  # fmt: skip

_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<![\w-])eyJ[\w-]{8,1000}\.[\w-]{4,}\.[\w-]*"
    r"|\brdev_(?:sk|admin)_\w{16,}"
    r"|\b(?:gh[opsur]_|github_pat_|glpat-|npm_|hf_|pypi-|dckr_pat_|xox[abeoprs]-)[\w-]{16,}"
    r"|\bsk[-_][\w-]{16,}"
    r"|\bwhs(?:ec|k)_[\w+/=-]{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bAIza[\w-]{35}",
    re.DOTALL,
)

# Each keeps its groups `before` and `after`; what is between goes.
_AROUND = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # scheme://user:password@host, and https://token@host
        r"(?P<before>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,20}://[^\s/:@?#'\"]*:)[^\s/@'\"]*(?P<after>@)",
        r"(?P<before>\bhttps?://)[^\s/:@?#'\"]+(?P<after>@)",
        # Authorization: Bearer …, and the same without its header; a name with `=` is no token
        r"(?P<before>\b(?:bearer|basic|digest)\s+)(?!-)[\w+/.~-]{6,}={0,3}(?![\w+/.~='\"-])(?P<after>)",
        # a whole header, to the end of its line or quotes: Cookie: a=b; c=d
        r"(?P<before>\b(?:set-)?cookie\s*[:=]\s*)[^\"'\r\n]+(?P<after>)",
        r"(?P<before>\b(?:proxy-)?authorization\s*:\s*(?:[a-z-]+\s+)?)[^\s\"']+(?P<after>)",
        # curl -u name:password
        r"(?P<before>(?<!\S)(?:-u|--user|--proxy-user)[=\s]\s*[\"']?[^\s:\"']*:)[^\s\"']+(?P<after>)",
        # a variable or field of a cookie: SESSION_COOKIE=…
        rf"(?P<before>(?<![\w.-])[\w.-]{{1,64}}?cookie=){_VALUE}(?P<after>)",
        # name=value, "name": "value", --name value
        rf"(?P<before>(?<![\w.-]){_NAME}[\"']?\s*(?:=|:(?!/))\s*){_VALUE}(?P<after>)",
        rf"(?P<before>(?<!\S)--{_NAME}\s+)(?!-){_VALUE}(?P<after>)",
    )
]

_OPTION = re.compile(rf"--?{_ANY_NAME}", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"(?P<name>-{{0,2}}{_ANY_NAME})=.+", re.IGNORECASE | re.DOTALL)
_SECRET_NAME = re.compile(_ANY_NAME, re.IGNORECASE)
_USER_OPTIONS = frozenset({"-u", "--user", "--proxy-user"})


def may_hide(text: str, values: Iterable[str] = ()) -> bool:
    """Whether `redact_text` could find anything: false means it would not."""
    lower = text.lower()
    for hint in _HINTS:  # for every log line: half the price of any()
        if hint in lower:
            return True
    return any(value in text for value in values)


def redact_text(text: str, values: Iterable[str] = ()) -> str:
    """The text without what looks like a secret, and without these values wherever they stand."""
    for value in values:
        text = text.replace(value, REDACTED)
    if not may_hide(text):
        return text
    text = _SHAPES.sub(REDACTED, text)
    for pattern in _AROUND:
        text = pattern.sub(rf"\g<before>{REDACTED}\g<after>", text)
    return text


def redact_argv(argv: Sequence[str], values: Collection[str] = ()) -> tuple[str, ...]:
    """The arguments without secrets, as many as there were. `values` as `redact_text`.

    An argument that is no script is a value to its end, whatever is in it.
    """
    known = known_values(values)
    shown: list[str] = []
    before = ""
    for argument in argv:
        shown.append(_argument(argument, before, known))
        before = argument
    return tuple(shown)


def secret_values(env: Mapping[str, str]) -> list[str]:
    """Values of variables whose names are those of secrets."""
    return [value for name, value in env.items() if is_secret_name(name)]


def known_values(values: Iterable[str]) -> list[str]:
    """Those that are long enough to be looked for, longest first: one that holds another goes as a
    whole."""
    known = {value for value in values if len(value) >= VALUE_CHARACTERS_MIN}
    return sorted(known, key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Whether what has this name (a variable, an option, a field) is a secret."""
    return _SECRET_NAME.fullmatch(name) is not None


def _argument(argument: str, before: str, known: Sequence[str]) -> str:
    if before == "-c":
        return redact_text(argument, known)
    if _OPTION.fullmatch(before) and not argument.startswith("-"):
        return REDACTED
    if before in _USER_OPTIONS and ":" in argument:
        return f"{argument.partition(':')[0]}:{REDACTED}"
    assigned = _ASSIGNMENT.fullmatch(argument)
    if assigned is not None:
        return f"{assigned['name']}={REDACTED}"
    return redact_text(argument, known)
