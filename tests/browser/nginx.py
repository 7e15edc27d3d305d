"""Debian's nginx with deploy/nginx/rdev.conf, on loopback ports, in a folder of its own.

What Debian's nginx.conf sets stays as it is (gzip on, buffering on); names and addresses of the
sample are replaced, each of which must be found once. Ended by its pid.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.app.server import DEADLINE_S, POLL_S, ROOT

SAMPLE = ROOT / "deploy" / "nginx" / "rdev.conf"
# Its users' PATH may lack sbin.
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

MAIN = """
{user}
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/main-error.log;
{more}
events {{ worker_connections 768; }}
http {{
    client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
    uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
    # As in Debian's nginx.conf.
    sendfile on;
    tcp_nopush on;
    types_hash_max_size 2048;
    default_type application/octet-stream;
    ssl_prefer_server_ciphers on;
    access_log {folder}/main.log;
    gzip on;
    # Pages of other origins.
    server {{
        listen 127.0.0.1:{elsewhere} ssl;
        ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem;
        default_type text/html;
        location / {{ return 200 "<!doctype html><title>elsewhere</title>"; }}
    }}
    include {folder}/rdev.conf;
}}
"""


def make_certificate(folder: Path) -> Path:
    """`cert.pem` and `key.pem` for loopback; the path of the authority's own certificate."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1", "::1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for part in issued.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder / "ca.pem"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One line of the access log."""

    method: str
    path: str
    protocol: str
    status: int
    last_event_id: str


_LINE = re.compile(
    r'\S+ \[\S+\] "(?P<method>\S+) (?P<path>\S+) (?P<protocol>\S+)" (?P<status>\d+) \d+ \S+ '
    r'"(?P<last>[^"]*)" "[^"]*"'
)


class Nginx:
    """One running nginx."""

    def __init__(self, folder: Path, *, upstream: str, more: str = "") -> None:
        """`upstream`: `host:port` of rdev; `more`: further settings of the main context."""
        self.folder = folder
        self.port, self.elsewhere_port = free_port(), free_port()
        self._upstream, self._more = upstream, more
        self.authority = make_certificate(folder)
        self.allowed_origin: str | None = None
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def write(self) -> None:
        """Its configuration: the sample with this test's names."""
        user = "user root;" if os.getuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            MAIN.format(
                user=user, folder=self.folder, more=self._more, elsewhere=self.elsewhere_port
            )
        )
        text = SAMPLE.read_text()
        replaced = {
            "server 127.0.0.1:8080;": f"server {self._upstream};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.port} ssl http2;",
            "server_name rdev.example;": "server_name localhost 127.0.0.1;",
            "/etc/ssl/rdev.crt": f"{self.folder}/cert.pem",
            "/etc/ssl/rdev.key": f"{self.folder}/key.pem",
            "/var/log/nginx/rdev.log": f"{self.folder}/rdev.log",
            "/var/log/nginx/rdev-error.log": f"{self.folder}/rdev-error.log",
        }
        if self.allowed_origin is not None:
            comment = "# add_header Access-Control-Allow-Origin https://console.example;"
            header = f"add_header Access-Control-Allow-Origin {self.allowed_origin};"
            replaced[comment] = header
        for old, new in replaced.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.folder / "rdev.conf").write_text(text)

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert NGINX is not None
        self.write()
        argv = [NGINX, "-c", str(self.folder / "nginx.conf"), "-p", str(self.folder)]
        self.process = subprocess.Popen([*argv, "-e", str(self.folder / "main-error.log")])
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None, self.errors
                assert time.monotonic() < deadline_s, self.errors
                time.sleep(POLL_S)
            else:
                return

    def reload(self) -> None:
        """Take new workers, as `nginx -s reload` does, and wait until the old ones know."""
        assert self.process is not None
        before = self.workers()
        self.write()
        self.process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.workers() - before:
            assert time.monotonic() < deadline_s, self.errors
            time.sleep(POLL_S)

    def workers(self) -> set[int]:
        """The pids of its workers, those that are leaving too."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return {int(pid) for pid in children.read_text().split()}

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(DEADLINE_S)

    @property
    def errors(self) -> str:
        """What it wrote to its error logs."""
        logs = [self.folder / "main-error.log", self.folder / "rdev-error.log"]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    @property
    def access(self) -> str:
        """The access log of rdev's site."""
        log = self.folder / "rdev.log"
        return log.read_text() if log.exists() else ""

    def requests(self, path: str) -> list[Logged]:
        """What was asked for under a path, in the order it was over."""
        lines = [_LINE.fullmatch(line) for line in self.access.splitlines()]
        return [
            Logged(
                method=line["method"],
                path=line["path"],
                protocol=line["protocol"],
                status=int(line["status"]),
                last_event_id=line["last"],
            )
            for line in lines
            if line is not None and line["path"] == path
        ]


@contextmanager
def open_nginx(folder: Path, *, upstream: str, more: str = "") -> Iterator[Nginx]:
    """An nginx in front of `upstream` for the length of the block."""
    nginx = Nginx(folder, upstream=upstream, more=more)
    nginx.start()
    try:
        yield nginx
    finally:
        nginx.stop()
