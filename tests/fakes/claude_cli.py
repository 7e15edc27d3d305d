#!/usr/bin/env python3
"""Stands in for the claude command line: prints recorded stream-json lines and exits as it does.

`claude/logged_out.jsonl` and `claude/resume_unknown.jsonl` are what Claude Code 2.1.197 printed
without a login and without a network (ids and paths replaced). `claude/success.jsonl` was written
by hand in the same shape. Like the real one it takes no unknown option, wants `--verbose` with
stream-json, and waits for the end of stdin.

The mode is FAKE_CLAUDE_MODE, else the prompt's first word where that is a mode, else `success`.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

RECORDED = Path(__file__).parent / "claude"
MODES = (
    "success",
    "logged-out",
    "resume-unknown",
    "hang-after-result",
    "big-line",
    "garbage",
    "slow",
    "no-result",
)
BIG_LINE_BYTES = 400_000
# Half a pair (valid JSON, no Unicode), broken UTF-8, no JSON, an array, an unknown type, CR.
GARBAGE = (
    b'{"type":"assistant","text":"cut \\ud83d"}\n'
    b'{"type":"\xff"}\n'
    b"Warning: not JSON at all\n"
    b"[1,2]\n"
    b'{"type":"brand_new_thing","x":1}\n'
    b'{"type":"unfinished"\n'
    b'{"type":"carriage"}\r\n'
)
WITH_VALUE = (
    "--output-format",
    "--session-id",
    "--resume",
    "--model",
    "--permission-mode",
    "--max-turns",
    "--allowedTools",
    "--disallowedTools",
    "--append-system-prompt",
    "--mcp-config",
)


def refuse(message: str) -> None:
    """End as the real one does on a bad call."""
    print(message, file=sys.stderr)
    sys.exit(1)


def parse(words: list[str]) -> argparse.Namespace:
    """Options take the next word whatever it is, as in commander; argparse would refuse a dash."""
    options: dict[str, str] = {}
    flags: set[str] = set()
    operands: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            operands += words
            break
        if word in WITH_VALUE and words:
            options[word] = words.pop(0)
        elif word in ("-p", "--verbose"):
            flags.add(word)
        elif word.startswith("-"):
            refuse(f"error: unknown option '{word}'")
        else:
            operands.append(word)
    if options.get("--output-format") != "stream-json" or flags != {"-p", "--verbose"}:
        refuse("Error: When using --print, --output-format=stream-json requires --verbose")
    if len(operands) != 1:
        refuse("Error: Input must be provided either through stdin or as a prompt argument")
    session = options.get("--session-id") or options.get("--resume")
    return argparse.Namespace(prompt=operands[0], session=session)


def lines_of(name: str, session: str | None) -> list[bytes]:
    """The recorded lines, under the session that was asked for and in this folder."""
    text = (RECORDED / f"{name}.jsonl").read_text(encoding="utf-8")
    recorded = "00000000-0000-4000-8000-000000000001"
    text = text.replace(f'"session_id":"{recorded}"', f'"session_id":"{session or recorded}"')
    text = text.replace('"cwd":"/workspace"', f'"cwd":{json.dumps(str(Path.cwd()))}')
    return text.encode().splitlines(keepends=True)


def write(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def main() -> None:
    """Print, then exit as the mode says."""
    request = parse(sys.argv[1:])
    sys.stdin.buffer.read()
    first_word = request.prompt.split(maxsplit=1)[0] if request.prompt.strip() else ""
    named = first_word if first_word in MODES else "success"
    mode = os.environ.get("FAKE_CLAUDE_MODE", named)
    failing = mode in ("logged-out", "resume-unknown")
    recorded = lines_of(mode.replace("-", "_") if failing else "success", request.session)
    if mode == "no-result":
        recorded.pop()
    if mode == "big-line":
        big = {"type": "user", "content": "x" * BIG_LINE_BYTES}
        recorded.insert(-1, json.dumps(big).encode() + b"\n")
    if mode == "garbage":
        recorded.insert(-1, GARBAGE)
    for line in recorded:
        write(line)
        if mode == "slow":
            time.sleep(0.3)
    if mode == "hang-after-result":
        signal.pause()
    sys.exit(1 if failing else 0)


if __name__ == "__main__":
    main()
