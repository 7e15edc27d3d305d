"""A checkpoint as a line of JSON: made, and read again.

    {"seq": 4711, "hash": "<hex>", "at": "<RFC 3339>", "server": "<name>", "signature": "<base64>"}

Signed with Ed25519 (RFC 8032) over `rdev-audit-1`, `seq`, `hash`, `at` and `server`, a line each.
The private key is derived from the server's secret; who verifies needs the public one only.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from rdev.domain.audit_chain import Checkpoint, Place
from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.purposes import derived_key

PURPOSE = "audit-checkpoint"
_PREFIX = "rdev_ac_"
_VERSION = "rdev-audit-1"
_BEGIN = b'{"seq":'
PUBLIC_BYTES = 32


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    seq: int
    hash: str
    at: str
    server: str
    signature: str = ""

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return "\n".join([_VERSION, str(self.seq), self.hash, self.at, self.server]).encode()


class Signer:
    """Makes lines. Its key is in no `repr`."""

    def __init__(self, secret: bytes, *, server: str) -> None:
        """`secret` is that of the service, `server` the name of this one."""
        self._key = Ed25519PrivateKey.from_private_bytes(derived_key(secret, PURPOSE))
        self._server = server

    @property
    def public_key(self) -> str:
        """What verifies the lines; fit for anybody."""
        raw = self._key.public_key().public_bytes_raw()
        return _PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    def line(self, place: Place, at: str) -> bytes:
        """The line, with its end."""
        line = _Line(seq=place.seq, hash=place.hash.hex(), at=at, server=self._server)
        line.signature = base64.b64encode(self._key.sign(line.signed)).decode()
        return msgspec.json.encode(line) + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgedLine(Exception):  # noqa: N818  (what it is, not what went wrong here)
    """A line that the key did not sign, by its number from 1."""

    number: int
    seq: int


class Reader:
    """Reads lines that one key has signed."""

    def __init__(self, public_key: str) -> None:
        """Errors: BAD_REQUEST for what is no public key of checkpoints."""
        text = public_key.removeprefix(_PREFIX)
        try:
            raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (ValueError, binascii.Error):
            raw = b""
        if len(raw) != PUBLIC_BYTES or not public_key.startswith(_PREFIX):
            message = f"the public key must be {_PREFIX}… as `rdev audit key` prints it"
            raise RdevError(ErrorCode.BAD_REQUEST, message)
        self._key = Ed25519PublicKey.from_public_bytes(raw)

    def checkpoints(self, lines: Iterable[bytes]) -> Iterator[Checkpoint]:
        """What the lines keep; one that a crash tore off, at the end or with others behind it, is
        passed over.

        Errors: ForgedLine.
        """
        for number, text in enumerate(lines, start=1):
            if not text.strip() or not text.endswith(b"\n") or _is_torn(text):
                continue
            yield self._checkpoint(number, text)

    def _checkpoint(self, number: int, text: bytes) -> Checkpoint:
        seq = 0
        try:
            line = msgspec.json.decode(text, type=_Line)
            seq = line.seq
            self._key.verify(base64.b64decode(line.signature, validate=True), line.signed)
            place = Place(seq=line.seq, hash=bytes.fromhex(line.hash))
            return Checkpoint(place=place, at=datetime.fromisoformat(line.at).astimezone(UTC))
        except (msgspec.MsgspecError, InvalidSignature, ValueError) as error:
            raise ForgedLine(number=number, seq=seq) from error


def _is_torn(text: bytes) -> bool:
    """Whether it is the beginning of a line. It says nothing; who can make one of a line could as
    well take the line away."""
    if not text.startswith(_BEGIN) and not _BEGIN.startswith(text.rstrip()):
        return False
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return not text.rstrip().endswith(b"}")
    return False
