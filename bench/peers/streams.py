"""Servers of event streams to compare with: those that are installed here, or can be.

They are no dependencies of rdev. What cannot be had is left out, with the reason printed.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.peers.installed import venv

HERE = Path(__file__).parent
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamServer:
    """How a server is started, where its stream is, and what stands before an event's number.

    `pins_itself`: its script, which is not what is measured, pins the server.
    """

    name: str
    argv: tuple[str, ...]
    path: str
    marker: str
    pins_itself: bool = False


def rdev(path: str) -> StreamServer:
    """rdev's hub and HTTP server; `path` is the stream's."""
    argv = (sys.executable, "-m", "bench.fanout_server")
    return StreamServer(name="rdev", argv=argv, path=path, marker="\nid: ")


def install(folder: Path) -> list[StreamServer]:
    """Those that can be had here. What is already in the folder is used again."""
    found = []
    for name, make in (("nchan", _nchan), ("sse_starlette", _sse_starlette)):
        try:
            found.append(make(folder))
        except (OSError, subprocess.SubprocessError) as error:
            print(f"left out: {name}: {error}", flush=True)
    return found


def _nchan(folder: Path) -> StreamServer:
    if shutil.which("nginx") is None or not NCHAN_MODULE.exists():
        raise FileNotFoundError("there are no nginx and libnginx-mod-nchan (Debian packages)")
    argv = (sys.executable, str(HERE / "on_nchan.py"))
    return StreamServer(name="nchan", argv=argv, path="/sub", marker='"seq":', pins_itself=True)


def _sse_starlette(folder: Path) -> StreamServer:
    python = venv(
        folder / "sse_starlette", "sse-starlette", "starlette", "uvicorn", "uvloop", "httptools"
    )
    argv = (python, str(HERE / "on_sse_starlette.py"))
    return StreamServer(name="sse_starlette", argv=argv, path="/", marker="id: ")
