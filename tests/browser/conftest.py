"""A real nginx, a real Chromium and real servers. `make test-browser`; no part of `make test`.

Needed: Debian's `nginx`, `chromium`, `curl` (apt-get install), and `playwright` from PyPI in the
environment. What is missing is named where a test is skipped; nothing is installed here.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.app.server import Server, open_server
from tests.browser.nginx import NGINX, Nginx, open_nginx

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it takes minutes, and programs that not everybody has."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.full)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def needs_nginx() -> None:
    if NGINX is None:
        pytest.skip("there is no nginx: apt-get install nginx")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl: apt-get install curl")


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """Debian's Chromium, without a window."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip(
            "there is no playwright: pip install 'playwright>=1.60' (no browser of its own)"
        )
    from playwright.sync_api import sync_playwright

    # Root has no sandbox to go into.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server(quick_place: Path) -> Iterator[Server]:
    """A server of the test's own, which may be restarted; nginx is its trusted proxy."""
    settings = {"RDEV_TRUSTED_PROXIES": "127.0.0.0/8", "RDEV_GRACE_S": "5"}
    with open_server(quick_place, **settings) as server:
        server.keep_port()
        yield server


@pytest.fixture
def nginx(needs_nginx: None, server: Server, tmp_path: Path) -> Iterator[Nginx]:
    """nginx in front of it."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    with open_nginx(folder, upstream=server.url.removeprefix("http://")) as nginx:
        yield nginx
