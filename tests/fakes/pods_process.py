"""A fake cluster in a process of its own, for measurements: `python -m tests.fakes.pods_process`.

Arguments: a folder for what is in its pods, and how many pods there are besides `demo`. Prints one
JSON line: kubeconfigs of the API server and of a proxy before it. Then a line on stdin is a request
and one JSON line its answer: `cut` drops all connections of the proxy and says when (ns of the
monotonic clock), `count` says how many requests the API server was asked. Ends with its stdin.
"""

import json
import os
import sys
import time
from pathlib import Path

import trio

from tests.app.pods import FakeCluster, fake_cluster


async def main(folder: Path, pods: int) -> None:
    """Serve until stdin ends."""
    async with fake_cluster(folder) as cluster:
        for number in range(pods):
            cluster.add_pod(f"idle-{number}")
        direct = folder / "kubeconfig-direct"
        direct.write_text(json.dumps(cluster.api.kubeconfig()))
        print(json.dumps({"direct": str(direct), "proxy": str(cluster.kubeconfig)}), flush=True)
        try:
            async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
                async for data in stdin:
                    for word in data.split():
                        print(json.dumps(answer(cluster, word)), flush=True)
        finally:
            cluster.end_processes()


def answer(cluster: FakeCluster, word: bytes) -> dict[str, int]:
    match word:
        case b"cut":
            now_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            cluster.proxy.cut_all()
            return {"at_ns": now_ns}
        case _:
            return {"requests": len(cluster.api.requests)}


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
