"""What the commands of the cut tests run: a program that writes to both streams for a while.

`python cut_writer.py KIND SEED LIFE_S`. It knows nothing of rdev; what it wrote stands in the
journals of its command.
"""

import os
import random
import sys
import time
from collections.abc import Callable

# Lines that end a field, an event or a string where they are not written with care.
ODD = (
    b"",
    b"\r",
    b"a\rb\r\rc",
    b"\0\0nul\0",
    b"\xef\xbb\xbfBOM",
    b"\xff\xfe\x80 not UTF-8",
    b"\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80",
    b"\xe2\x80\xa8line separator\xc2\x85next line",
    b"data: x",
    b"id: 7",
    b"event: complete",
    b": comment",
    b'{"stream":"stdout","line":"\\u0000"}',
    b"0\r",
    b"x" * 20_000,
    b"\xff" * 17_000,
)
FLOOD_BYTES = 1_500_000


def main(kind: str, seed: str, life_s: str) -> None:
    """Write to the end of its life."""
    chance = random.Random(f"{kind} {seed}")
    until_s = time.monotonic() + float(life_s)
    step = STEPS[kind]
    number = 0
    while time.monotonic() < until_s:
        number += 1
        time.sleep(step(chance, number))
    os.write(1, b"the end, without a line end")


def trickle(chance: random.Random, number: int) -> float:
    """A line now and then."""
    put(chance, b"line %d %s\n" % (number, b"." * chance.randrange(80)))
    return chance.uniform(0.002, 0.05)


def odd(chance: random.Random, number: int) -> float:
    """Bytes that a stream of text does not like."""
    put(chance, b"%d " % number + chance.choice(ODD) + b"\n")
    return chance.uniform(0.002, 0.05)


def burst(chance: random.Random, number: int) -> float:
    """Many lines at once, then silence."""
    lines = [b"burst %d.%d\n" % (number, n) for n in range(chance.randrange(20, 1_500))]
    put(chance, b"".join(lines))
    return chance.uniform(0.1, 0.6)


def partial(chance: random.Random, number: int) -> float:
    """Half a line, shown after a silence; then the rest, or another half."""
    put(chance, b"%d? " % number)
    time.sleep(chance.choice((0.0, 0.15, 0.25)))
    put(chance, chance.choice((b"yes\n", b"no ", b"\n", b"\r\n", b"\xe2\x82")))
    return chance.uniform(0.0, 0.05)


def flood(chance: random.Random, number: int) -> float:
    """More than is kept, as fast as it goes, and then slowly more."""
    if number == 1:
        time.sleep(chance.uniform(0.0, 0.4))
        for stream in chance.choice(((1,), (2,), (1, 2))):
            for first in range(0, FLOOD_BYTES, 30_000):
                put_to(stream, b"flood %08d %s\n" % (first, b"=" * 80) * 300)
    put(chance, b"after the flood %d\n" % number)
    return chance.uniform(0.005, 0.1)


def put(chance: random.Random, data: bytes) -> None:
    """Write to one stream or the other."""
    put_to(chance.choice((1, 1, 2)), data)


def put_to(stream: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(stream, data) :]


STEPS: dict[str, Callable[[random.Random, int], float]] = {
    "trickle": trickle,
    "odd": odd,
    "burst": burst,
    "partial": partial,
    "flood": flood,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
