"""One stream of JSON lines for everything the process logs, with the guide's fields.

structlog and the standard library's loggers (ours and the vendors') go through the same processors
to the same handler. Secrets are taken out last, so nothing that was added later escapes.
"""

import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from rdev.domain.redaction import REDACTED, may_hide, redact_text
from rdev.ports.telemetry import log_context

# Parts of a field's name that make its value a secret, whatever it is.
_SECRET_NAMES = ("password", "secret", "token", "authorization", "credential", "cookie")
# Names that are secret as a whole; as parts they would hide `key_id` and `environment`.
_SECRET_WORDS = frozenset({"key", "api_key", "x-api-key", "env", "stdin", "dsn"})

# Shorter values are words that occur by chance.
_MIN_SECRET_CHARACTERS = 8

# Values deeper than this are not looked into but cut: a log line is no place for a tree.
_MAX_DEPTH = 6

# Who writes the line of each request: it has the guide's fields and `trace_id`, nothing else.
REQUESTS = "rdev.http.requests"
REQUEST_FIELDS = ("method", "path", "status", "duration_ms", "client_ip")

# Write a line for each request that this process makes; one for an exec has 800 bytes.
_REPORTING = {"httpx2": "warn"}

_LEVELS = {"warning": "warn", "critical": "error", "exception": "error"}


class Levels:
    """What is written: from which level on, and of which loggers otherwise."""

    def __init__(self) -> None:
        """Nothing is set yet."""
        self._own: list[logging.Logger] = []

    def set(self, level: str, levels: Mapping[str, str] | None = None) -> None:
        """From now on. `levels` are loggers' own, which hold for those below them too; who had one
        and is not named any more follows the rest. On `info` those of `_REPORTING` are quieter,
        unless they are named. Levels: `debug`, `info`, `warn`, `error`. Errors: KeyError for
        another; then nothing is changed."""
        number = _level_number(level)
        quiet = _REPORTING if number == logging.INFO else {}
        own = {name: _level_number(one) for name, one in {**quiet, **(levels or {})}.items()}
        for logger in self._own:
            logger.setLevel(logging.NOTSET)
        logging.getLogger().setLevel(number)
        self._own = [logging.getLogger(name) for name in own]
        for logger in self._own:
            logger.setLevel(own[logger.name])


def configure_logs(
    *,
    level: str,
    levels: Mapping[str, str] | None = None,
    secrets: Iterable[str] = (),
    output: TextIO | None = None,
) -> Levels:
    """Send every log of the process to `output` (default: stdout) as JSON lines.

    `level` and `levels` are as of `Levels.set`, and can be changed by what is returned. `secrets`
    are values (of at least 8 characters) that are replaced wherever they stand. On a terminal the
    lines are for people instead.
    """
    found = Levels()
    found.set(level, levels)
    output = output or sys.stdout
    handler = logging.StreamHandler(output)
    handler.setFormatter(_formatter(secrets, is_terminal=output.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # No line shows from which code or thread it comes; finding that was a third of its price.
    # Source: Python's "Logging HOWTO", Optimization.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    _bridge_vendors()
    structlog.configure(
        processors=[*_shared(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    return found


def bridge_python() -> None:
    """Have what Python itself writes on stderr (warnings, what ends the process, what a finalizer
    or a thread raises) written as lines too: in one place, as JSON, without secrets. For the
    process that serves."""
    logging.captureWarnings(True)
    sys.excepthook = _on_end
    sys.unraisablehook = lambda told: _tell("exception ignored", told.exc_value)
    threading.excepthook = lambda told: _tell("a thread failed", told.exc_value)


def _on_end(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    _tell("ended by a defect", error)


def _tell(what: str, error: BaseException | None) -> None:
    logging.getLogger("rdev").error(what, exc_info=error)


def _bridge_vendors() -> None:
    """Handlers that a library gave its loggers would write beside ours, and past the redaction."""
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def _level_number(level: str) -> int:
    """The number the standard library knows the level by. Errors: ValueError."""
    names = {"warn": "WARNING"}
    return logging.getLevelNamesMapping()[names.get(level, level.upper())]


def _shared() -> list[Processor]:
    """What is added to a line before it reaches the handler."""
    return [
        _add_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]


def _formatter(secrets: Iterable[str], *, is_terminal: bool) -> logging.Formatter:
    """From an event to the text of its line."""
    redaction = Redaction(secrets)
    render: Processor = structlog.dev.ConsoleRenderer(event_key="msg") if is_terminal else _to_json
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_shared(), structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _guide_names,
            redaction,
            render,
        ],
    )
    return formatter if is_terminal else _RequestsFirst(formatter, redaction)


class _RequestsFirst(logging.Formatter):
    """The lines of requests are made straight from their records: there are more of them than of
    all others, and it is half of the price."""

    def __init__(self, others: logging.Formatter, redaction: "Redaction") -> None:
        super().__init__()
        self._others = others
        self._redaction = redaction

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        if record.name != REQUESTS:
            return self._others.format(record)
        moment = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        level = record.levelname.lower()
        event: EventDict = {
            "level": _LEVELS.get(level, level),
            "time": f"{moment.isoformat(timespec='microseconds')}Z",
            "msg": record.msg,
            **(log_context.get() or {}),
            **{name: record.__dict__[name] for name in REQUEST_FIELDS},
        }
        return _to_json(None, level, self._redaction(None, level, event))


def _add_context(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The fields of the running request; what the line says itself goes before them."""
    for name, value in (log_context.get() or {}).items():
        event.setdefault(name, value)
    return event


def _guide_names(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The guide's names and order: level, time, msg, then the rest."""
    level = str(event.pop("level", "info"))
    if event.get("logger") == REQUESTS:  # on a terminal
        del event["logger"]
    return {
        "level": _LEVELS.get(level, level),
        "time": event.pop("time", None),
        "msg": event.pop("event", ""),
        **event,
    }


def _to_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    """One line; values JSON does not know are written as text."""
    return msgspec.json.encode(event, enc_hook=str).decode()


class Redaction:
    """Takes secrets out of a line: by the field's name, and by value or shape anywhere."""

    def __init__(self, secrets: Iterable[str]) -> None:
        """Values shorter than 8 characters are ignored."""
        # Longest first: a secret that contains another one goes as a whole.
        known = {secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARACTERS}
        self._secrets = sorted(known, key=len, reverse=True)

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        """The line without secrets."""
        if self._is_plain(event):
            return event
        return {name: self._field(name, value, 0) for name, value in event.items()}

    def _is_plain(self, event: EventDict) -> bool:
        """Whether one look at the whole line tells that nothing is to be taken out: so it is with
        that of nearly every request, and it is a third of the price of a look at each value."""
        texts: list[str] = []
        for name, value in event.items():
            if _is_secret_name(name):
                return False
            if isinstance(value, str):
                texts.append(value)
            elif not isinstance(value, (int, float)) and value is not None:
                return False
        line = "\n".join(texts)
        return line.isascii() and not may_hide(line, self._secrets)

    def _field(self, name: object, value: object, depth: int) -> object:
        """A named value."""
        return REDACTED if _is_secret_name(str(name)) else self._value(value, depth)

    def _value(self, value: object, depth: int) -> object:
        """A value, looked into."""
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if depth > _MAX_DEPTH:
            return "…"
        if isinstance(value, Mapping):
            return {str(k): self._field(k, item, depth + 1) for k, item in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._value(item, depth + 1) for item in value]
        return self._text(value if isinstance(value, str) else str(value))

    def _text(self, text: str) -> str:
        """Text without the known secrets and what looks like one, and fit for UTF-8."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")
        return redact_text(text, self._secrets)


@lru_cache(maxsize=1024)
def _is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret."""
    name = name.lower()
    return name in _SECRET_WORDS or any(part in name for part in _SECRET_NAMES)
