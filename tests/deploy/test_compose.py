"""What drives the compose file (`make test-compose`, tests/e2e) fits to it, and may not be skipped
for a reason of its own making."""

import re
from typing import Any

import yaml

import rdev
from tests.deploy.conftest import DEPLOY, ROOT
from tests.e2e.stack import REASONS

E2E = ROOT / "tests" / "e2e"
RUN = (E2E / "run.sh").read_text()


class _Overrides(yaml.SafeLoader):
    """YAML with the tag by which compose replaces a list."""


_Overrides.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def stack() -> dict[str, Any]:
    found = yaml.load((E2E / "stack.yaml").read_text(), Loader=_Overrides)  # a safe one
    assert isinstance(found, dict)
    return found


def shipped() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_every_reason_to_run_without_an_engine_is_on_the_closed_list_or_fails() -> None:
    given = set(re.findall(r"^ +echo '(.+)'$", RUN, re.MULTILINE))
    broken = {reason for reason in given if re.fullmatch(r"\w+\.sh failed", reason)}
    assert given - broken == REASONS
    assert broken == {"engine.sh failed", "up.sh failed", "base.sh failed"}


def test_what_the_drive_adds_changes_nothing_that_is_promised() -> None:
    added = stack()["services"]
    assert set(added) - set(shipped()["services"]) == {"receiver"}
    assert set(added["database"]) == {"image"}
    assert set(added["rdev"]) == {"ports", "environment"}


def test_the_receiver_is_of_the_image_that_is_built() -> None:
    assert stack()["services"]["receiver"]["image"] == f"rdev:{rdev.__version__}"


def test_without_a_registry_another_postgresql_is_put_in_the_place_of_the_shipped_one() -> None:
    image = stack()["services"]["database"]["image"]
    assert image == f"${{RDEV_TEST_DATABASE_IMAGE:-{shipped()['services']['database']['image']}}}"


def test_the_base_of_the_drive_has_the_python_of_the_shipped_one() -> None:
    """Of the lock's conditions, which name versions."""
    containerfile = (DEPLOY / "Containerfile").read_text()
    assert re.search(
        r"^RELEASE=trixie # Python 3\.13,", (E2E / "base.sh").read_text(), re.MULTILINE
    )
    assert "python:3.13-" in containerfile
