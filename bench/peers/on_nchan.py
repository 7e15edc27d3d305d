"""nginx with nchan (Debian's packages), driven by a small publisher beside it.

Speaks as `bench.fanout_server`. nginx is what is measured, so it alone is pinned to the core that
the plan names; the publisher posts a burst as one pipelined write and waits for the answers.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINE = "x" * 60
MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
CONFIG = """
load_module {module};
user root;
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
worker_rlimit_nofile 20000;
events {{ worker_connections 16384; }}
http {{
  access_log off; nchan_shared_memory_size 256M;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location = /pub {{ nchan_publisher; nchan_channel_id c; nchan_message_buffer_length 1000;
                      keepalive_requests 1000000; }}
    location = /sub {{ nchan_subscriber eventsource; nchan_channel_id c;
                      nchan_subscriber_first_message newest; }}
    location = /stat {{ nchan_stub_status; }}
  }}
}}
"""


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="rdev-nchan-")
    config = Path(folder) / "nginx.conf"
    text = CONFIG.format(module=MODULE, folder=folder, port=port)
    config.write_text(text if os.getuid() == 0 else text.replace("user root;\n", ""))
    argv = ["taskset", "-c", str(plan["core"]), "nginx", "-c", str(config), "-p", folder]
    nginx = subprocess.Popen([*argv, "-e", f"{folder}/error.log"], stderr=subprocess.DEVNULL)
    try:
        publisher = _connected(port)
        print(json.dumps({"port": port}), flush=True)
        sys.stdin.readline()
        print(json.dumps(_publish(publisher, nginx.pid, plan)), flush=True)
        sys.stdin.readline()
    finally:
        nginx.terminate()
        nginx.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _connected(port: int) -> socket.socket:
    deadline_s = time.monotonic() + 10
    while True:
        try:
            opened = socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
        else:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return opened


def _publish(publisher: socket.socket, pid: int, plan: dict[str, int]) -> dict[str, float]:
    began_s, cpu_began_s = time.perf_counter(), _cpu_s(pid)
    for first in range(0, plan["events"], plan["burst"]):
        posts = b""
        wanted = min(plan["burst"], plan["events"] - first)
        for number in range(first, first + wanted):
            data = b'{"seq":%d,"stream":"stdout","line":"%b"}' % (number, LINE.encode())
            posts += b"POST /pub HTTP/1.1\r\nHost: bench\r\nX-EventSource-Event: output\r\n"
            posts += b"Content-Length: %d\r\n\r\n%b" % (len(data), data)
        publisher.sendall(posts)
        answered = 0
        while answered < wanted:
            answered += publisher.recv(65_536).count(b"HTTP/1.1 2")
    took_s = time.perf_counter() - began_s
    time.sleep(1.0)  # what is on its way costs, too
    return {"took_s": took_s, "cpu_s": _cpu_s(pid) - cpu_began_s}


def _cpu_s(pid: int) -> float:
    """Of nginx's master and its worker."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(entry.name) == pid or int(fields[1]) == pid:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


main()
