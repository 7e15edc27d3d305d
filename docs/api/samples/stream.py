"""Run a command and follow it, resuming at the last event whatever breaks. Standard library only.

Needs URL, KEY, PROJECT; arguments: the command. Exits with the command's exit code.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

URL, KEY, PROJECT = os.environ["URL"], os.environ["KEY"], os.environ["PROJECT"]
HEADERS = {"X-API-Key": KEY, "Content-Type": "application/json"}


def submit(command: str) -> str:
    """The id of the command, which is that of its stream."""
    body = json.dumps({"command": command}).encode()
    request = urllib.request.Request(f"{URL}/projects/{PROJECT}/shell", body, HEADERS)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["data"]["id"]


def events(command: str, after: str) -> Iterator[tuple[str, str, dict]]:
    """(id, name, data) of each event behind `after`; ends when the connection does."""
    request = urllib.request.Request(
        f"{URL}/commands/{command}/events", headers={**HEADERS, "Last-Event-ID": after}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        fields: dict[str, str] = {}
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
                fields = {}


def follow(command: str) -> int:
    after = "0"
    while True:
        try:
            for seq, name, data in events(command, after):
                after = seq or after
                if name == "output" and "line" in data:
                    out = sys.stdout if data["stream"] == "stdout" else sys.stderr
                    print(data["line"], end="" if data.get("partial") else "\n", file=out)
                elif name == "complete":
                    return data["exit_code"] if data["exit_code"] is not None else 1
        except urllib.error.HTTPError:
            raise  # 404, 410, 401: coming back would not help
        except OSError as error:
            print(f"lost the stream ({error}), resuming behind {after}", file=sys.stderr)
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(follow(submit(" ".join(sys.argv[1:]))))
