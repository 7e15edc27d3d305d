"""Identifiers on the wire: a prefix and a UUIDv7 in 32 hex digits, so they sort by creation."""

import re
from collections.abc import Callable
from typing import NewType
from uuid import UUID

CommandId = NewType("CommandId", str)
# Names one attempt of a command, in its project: no other attempt has its folder.
AttemptId = NewType("AttemptId", str)
ProjectId = NewType("ProjectId", str)
KeyId = NewType("KeyId", str)

# Makes a fresh UUIDv7. Injected: the domain draws no randomness and reads no clock.
NewUuid = Callable[[], UUID]

COMMAND_PREFIX = "cmd_"
KEY_PREFIX = "key_"

# How often a command is started at most (`retry: safe`; the others once).
ATTEMPTS_MAX = 3

_COMMAND = re.compile(r"cmd_[0-9a-f]{32}")
_KEY = re.compile(r"key_[0-9a-f]{32}")
PROJECT_MAX_BYTES = 40
# A DNS-1123 label of at most 40 characters (the HTTP contract).
PROJECT_PATTERN = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


def command_id(uuid: UUID) -> CommandId:
    """The wire form of a command's UUID."""
    return CommandId(COMMAND_PREFIX + uuid.hex)


def command_uuid(command: CommandId) -> UUID:
    """The UUID inside a command id that was made by `command_id` or passed `is_command_id`."""
    return UUID(command.removeprefix(COMMAND_PREFIX))


def key_id(uuid: UUID) -> KeyId:
    """The wire form of a key's UUID."""
    return KeyId(KEY_PREFIX + uuid.hex)


def key_uuid(key: KeyId) -> UUID:
    """The UUID inside a key id that was made by `key_id` or passed `is_key_id`."""
    return UUID(key.removeprefix(KEY_PREFIX))


def is_key_id(text: str) -> bool:
    """Whether the text has the form of a stored key's id; says nothing about existence."""
    return _KEY.fullmatch(text) is not None


def attempt_id(command: CommandId, attempt: int) -> AttemptId:
    """The name of an attempt, numbered from 1; the first has its command's own."""
    return AttemptId(command if attempt == 1 else f"{command}.{attempt}")


def command_of(attempt: AttemptId) -> CommandId:
    """The command of an attempt."""
    return CommandId(attempt.partition(".")[0])


def attempt_ids(command: CommandId) -> list[AttemptId]:
    """The names of all attempts that a command may have had."""
    return [attempt_id(command, number) for number in range(1, ATTEMPTS_MAX + 1)]


def is_command_id(text: str) -> bool:
    """Whether the text has the form of a command id; says nothing about existence."""
    return _COMMAND.fullmatch(text) is not None


def is_project_id(text: str) -> bool:
    """Whether the text is a DNS-1123 label of 1–40 characters."""
    return PROJECT_PATTERN.fullmatch(text) is not None
