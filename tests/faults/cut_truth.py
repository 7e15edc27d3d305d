"""What a command wrote, by its journals, and whether what a client saw is that, byte by byte.

A client's numbers must follow one another, each once; where a `gap` stands, its range begins where
the client is, at the latest. The bytes of each stream, with those that gaps stand for, are its
journal from the first byte to the last. Nothing here asks rdev what is right.
"""

import base64
import json
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

STREAMS = ("stdout", "stderr")
JOURNALS = {"stdout": "out", "stderr": "err"}
SNIPPET_BYTES = 60
FOUND_MAX = 40


class Journal:
    """One stream of a command on disk. It is read on, never again: whoever asks for bytes that are
    there has read them before the supervisor's folder goes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = bytearray()

    def part(self, start: int, length: int) -> bytes:
        """These bytes, as many as there are."""
        if start + length > len(self._known):
            self.read_on()
        return bytes(self._known[start : start + length])

    def read_on(self) -> int:
        """Read what is new; how many bytes it has."""
        if self._file.exists():
            with self._file.open("rb") as file:
                file.seek(len(self._known))
                self._known += file.read()
        return len(self._known)


class Truth:
    """One command: its journals, and where its events begin in them, as the clients agree."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the command's, in its project."""
        self.journals = {stream: Journal(folder / JOURNALS[stream]) for stream in STREAMS}
        # By number: where the event begins in its journal; -1 while nobody has seen it.
        self.starts = array("q")
        self.life: dict[int, bytes] = {}
        # Its output was made old by the test: from then on 410 is right.
        self.is_aged = False

    def start_of(self, seq: int) -> int:
        """Where the event, or the gap that begins with it, begins; -1 where nobody saw it."""
        return self.starts[seq] if seq < len(self.starts) else -1

    def agree(self, seq: int, start: int) -> bool:
        """Whether all clients see this number begin there."""
        while len(self.starts) <= seq:
            self.starts.append(-1)
        known = self.starts[seq]
        self.starts[seq] = start
        return known in (-1, start)

    def agree_on_life(self, seq: int, data: bytes) -> bool:
        """Whether all clients see the same event that is no output."""
        return self.life.setdefault(seq, data) == data


@dataclass(slots=True)
class Faults:
    """What must be zero, and the first of what was found."""

    lost: int = 0
    twice: int = 0
    wrong: int = 0
    found: list[str] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Remember it, unless there are enough of them."""
        if len(self.found) < FOUND_MAX:
            self.found.append(f"FOUND {what}"[:1_000])


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one client saw of one command, over all its connections."""

    name: str
    truth: Truth
    faults: Faults
    last_seq: int = 0
    offsets: Counter[str] = field(default_factory=Counter)
    events: int = 0
    gaps: int = 0
    gaps_within: int = 0  # those that began before where the client was
    is_complete: bool = False

    def take(self, name: str, seq: int, data: bytes) -> None:
        """The next event with a number."""
        first = json.loads(data)["first_seq"] if name == "gap" else seq
        if seq <= self.last_seq:
            self.faults.twice += 1
            self.faults.tell(f"{self.name}: {seq} came after {self.last_seq}")
            return
        if first > self.last_seq + 1:
            self.faults.lost += first - self.last_seq - 1
            self.faults.tell(f"{self.name}: {first} came after {self.last_seq}")
        self.events += 1
        if self.is_complete:
            self._wrong(f"{name} {seq} after complete")
        if name == "output":
            self._take_output(seq, json.loads(data))
        elif name == "gap":
            self._take_gap(first, json.loads(data))
        else:
            if not self.truth.agree_on_life(seq, data):
                self._wrong(f"{seq} is {data!r} and {self.truth.life[seq]!r}")
            self.is_complete = name == "complete"
        self.last_seq = seq
        if self.is_complete:
            self._check_end(json.loads(data))

    def _take_output(self, seq: int, data: dict[str, object]) -> None:
        stream = str(data["stream"])
        line = data.get("line")
        content = base64.b64decode(str(data["base64"])) if line is None else str(line).encode()
        content += b"" if data.get("partial") else b"\n"
        start = self.offsets[stream]
        written = self.truth.journals[stream].part(start, len(content))
        if written != content:
            told = f"{content[:SNIPPET_BYTES]!r} and not {written[:SNIPPET_BYTES]!r}"
            self._wrong(f"{stream} at {start}, {seq} has {told}")
        if not self.truth.agree(seq, start):
            self._wrong(f"{seq} begins at {start} of {stream}, not at {self.truth.starts[seq]}")
        self.offsets[stream] = start + len(content)

    def _take_gap(self, first: int, data: dict[str, object]) -> None:
        """Of its bytes some may have been seen already: it may begin before where the client is."""
        self.gaps += 1
        self.gaps_within += first <= self.last_seq
        stream, dropped_bytes = str(data["stream"]), int(str(data["dropped_bytes"]))
        start = self.offsets[stream] if first > self.last_seq else self.truth.start_of(first)
        if start < 0 or not self.truth.agree(first, start):
            self._wrong(f"the gap {data} begins at {start}")
        if start + dropped_bytes < self.offsets[stream]:
            self._wrong(f"the gap {data} ends before {self.offsets[stream]}")
        self.offsets[stream] = start + dropped_bytes

    def _check_end(self, told: dict[str, object]) -> None:
        """At `complete` everything was seen."""
        for stream, journal in self.truth.journals.items():
            written = journal.read_on()
            if (self.offsets[stream], told[f"{stream}_bytes"]) != (written, written):
                self._wrong(f"{stream} ended at {self.offsets[stream]} of {written}: {told}")
        if told["status"] != "succeeded":
            self._wrong(f"it ended: {told}")

    def _wrong(self, what: str) -> None:
        self.faults.wrong += 1
        self.faults.tell(f"{self.name}: {what}")
