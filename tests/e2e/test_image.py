"""The image, run as strictly as a cluster would: read-only, no capabilities, not root, no shell."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rdev
from tests.app.server import until
from tests.e2e.stack import Stack, docker, given

IMAGE = f"rdev:{rdev.__version__}"
BINARY = Path(os.environ.get("RDEV_TEST_BINARY", "")).absolute()
HARDENED = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges:true",
    "--tmpfs=/tmp",
)
# Over every shell of the base lies a file that cannot be run.
SHELLS = tuple(
    f"--volume=/dev/null:/usr/bin/{name}:ro" for name in ("sh", "dash", "bash", "busybox")
)
STATE = "--tmpfs=/var/lib/rdev:uid=10001,gid=10001,mode=0700"
READY = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/ready', timeout=3)"


@pytest.fixture(autouse=True)
def there_is_an_engine() -> None:
    given()


def run(*argv: str, options: tuple[str, ...] = ()) -> str:
    """Run the image's own entry point to its end, hardened and without a network."""
    return docker("run", "--rm", "--network=none", *HARDENED, *options, IMAGE, *argv).stdout


def inside(*argv: str) -> str:
    """Run a program of the image."""
    options = (f"--entrypoint={argv[0]}", "--network=none")
    return docker("run", "--rm", *HARDENED, *options, IMAGE, *argv[1:]).stdout.strip()


@contextmanager
def serving(
    stack: Stack,
    *options: str,
    argv: tuple[str, ...] = (),
    hardened: tuple[str, ...] = HARDENED,
) -> Iterator[str]:
    """A second server on the stack's database; the container's name."""
    name = f"rdev-e2e-{uuid.uuid4().hex[:8]}"
    settings = {"RDEV_DATABASE_DSN": stack.dsn(), "RDEV_ADMIN_KEY": stack.key}
    given_ = [f"--env={key}={value}" for key, value in settings.items()]
    place = ("--network=rdev-e2e_default", f"--hostname={name}", STATE, *given_)
    docker("run", "--detach", f"--name={name}", *hardened, *place, *options, IMAGE, *argv)
    try:
        check = ("exec", name, "python", "-P", "-c", READY)
        until(lambda: docker(*check, check=False).returncode == 0, "it is ready")
        yield name
    finally:
        logs = docker("logs", name, check=False)
        print((logs.stdout + logs.stderr)[-4_000:])
        docker("rm", "--force", "--volumes", name)


def stop(name: str) -> int:
    """SIGTERM, as orchestrators do; the exit status."""
    docker("stop", "--time=60", name)
    (state,) = json.loads(docker("inspect", name).stdout)
    status: int = state["State"]["ExitCode"]
    return status


def test_it_says_its_version() -> None:
    assert run("version").strip() == f"rdev {rdev.__version__}"


def test_its_user_is_a_number_that_is_not_root() -> None:
    (found,) = json.loads(docker("image", "inspect", IMAGE).stdout)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config.get("Healthcheck") is None
    assert not config.get("Volumes")
    assert config["Labels"]["org.opencontainers.image.version"] == rdev.__version__
    assert inside("id", "-u") == inside("id", "-g") == "10001"


def test_nothing_of_it_can_be_written_by_its_user() -> None:
    """Without `--read-only` too: what is not the state folder belongs to root."""
    found = docker(
        "run", "--rm", "--network=none", "--entrypoint=find", IMAGE, "/opt/rdev", "-writable"
    )
    assert found.stdout == ""


def test_it_has_no_machine_id_and_neither_compiler_nor_tests() -> None:
    script = (
        "import importlib.util as u, os, shutil;"
        "print(os.path.exists('/etc/machine-id'), shutil.which('gcc'),"
        " u.find_spec('pytest'), u.find_spec('rdev').origin)"
    )
    assert inside("python", "-c", script) == "False None None /opt/rdev/rdev/__init__.py"


def test_a_server_of_it_needs_no_shell_and_stops_cleanly(stack: Stack) -> None:
    with serving(stack, *SHELLS, "--init=false") as name:
        shell = docker("exec", name, "sh", "-c", "true", check=False)
        assert shell.returncode != 0
        assert stop(name) == 0
        logs = docker("logs", name)
        assert "Traceback" not in logs.stdout + logs.stderr


def test_a_server_of_it_writes_to_its_state_and_to_tmp_alone(stack: Stack) -> None:
    """On a root that could be written to: nothing of it was."""
    with serving(stack, hardened=tuple(set(HARDENED) - {"--read-only"})) as name:
        changed = docker("diff", name).stdout.splitlines()
        assert [line for line in changed if line.startswith(("A", "D"))] == []
        assert stop(name) == 0


@pytest.mark.skipif(not BINARY.is_file(), reason="RDEV_TEST_BINARY names no file: `make binary`")
def test_the_single_file_serves_from_the_image(stack: Stack) -> None:
    options = (
        f"--volume={BINARY}:/rdev:ro",
        "--tmpfs=/unpacked:exec,mode=1777",
        "--env=TMPDIR=/unpacked",
        "--env=PYTHONPATH=",
        "--entrypoint=/rdev",
    )
    assert run("version", options=options).strip() == f"rdev {rdev.__version__}"
    with serving(stack, *options, argv=("serve",)) as name:
        assert stop(name) == 0
