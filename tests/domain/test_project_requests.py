"""What a client may ask of a project that is a pod."""

from fractions import Fraction

import pytest

from rdev.domain.errors import RdevError
from rdev.domain.project_requests import amount, parse_folder_project, parse_project


def faults(body: dict[str, object]) -> list[str]:
    with pytest.raises(RdevError) as caught:
        parse_project({"id": "demo", **body})
    return [fault.pointer for fault in caught.value.faults]


def test_all_of_a_project_is_read() -> None:
    found = parse_project(
        {
            "id": "demo",
            "image": "registry.example:5000/team/tools:1.2@sha256:" + "a" * 64,
            "git_url": "https://git.example/team/repo.git",
            "git_ref": "feature/one",
            "env": {"A": "b"},
            "resources": {"requests": {"cpu": "250m", "storage": "5Gi"}, "limits": {"cpu": "1"}},
        }
    )
    assert (found.image or "").startswith("registry.example:5000/")
    assert found.git_ref == "feature/one"
    assert found.env == {"A": "b"}
    assert found.resources == {
        "requests": {"cpu": "250m", "storage": "5Gi"},
        "limits": {"cpu": "1"},
    }
    assert parse_project({"id": "demo"}) == parse_folder_project({"id": "demo", "image": None})


@pytest.mark.parametrize(
    "image", ["busybox", "debian:12-slim", "library/debian", "localhost:5000/a/b-c_d.e:X", "a.b/c"]
)
def test_images_are_references(image: str) -> None:
    assert parse_project({"id": "demo", "image": image}).image == image


@pytest.mark.parametrize(
    "image", ["", "Debian", "a b", "a:", "-a", "a//b", "a:b:c", "a@sha256:12", "a/", "é", 7, "a\n"]
)
def test_what_is_no_image_is_refused(image: object) -> None:
    assert faults({"image": image}) == ["/image"]


@pytest.mark.parametrize(
    "url",
    [
        "https://user:password@git.example/a",
        "https://token@git.example/a",
        "ext::sh -c touch% /tmp/x",
        "file:///etc",
        "/etc",
        "--upload-pack=x",
        "https://git.example",
        "https://git.example/a b",
        "git@git.example:a/b",
    ],
)
def test_addresses_with_secrets_or_tricks_are_refused(url: str) -> None:
    assert faults({"git_url": url}) == ["/git_url"]


@pytest.mark.parametrize("url", ["http://g/a", "ssh://git@git.example:22/team/repo.git"])
def test_addresses_of_repositories(url: str) -> None:
    assert parse_project({"id": "demo", "git_url": url}).git_url == url


@pytest.mark.parametrize("ref", ["-x", "a..b", "a b", "a//b", "a.", "~", ""])
def test_what_is_no_ref_is_refused(ref: str) -> None:
    assert faults({"git_url": "https://g.example/a", "git_ref": ref}) == ["/git_ref"]


def test_a_ref_needs_its_repository() -> None:
    assert faults({"git_ref": "main"}) == ["/git_ref"]


@pytest.mark.parametrize("quantity", ["0", "0.0", "-1", "1e3", "1 Gi", "1gi", "", "1.", ".5", 1])
def test_what_is_no_quantity_is_refused(quantity: object) -> None:
    body = {"resources": {"limits": {"memory": quantity}}}
    assert faults(body) == ["/resources/limits/memory"]


def test_a_request_is_not_above_its_limit() -> None:
    body = {"resources": {"requests": {"memory": "1025Mi"}, "limits": {"memory": "1Gi"}}}
    assert faults(body) == ["/resources"]
    assert faults({"resources": {"limits": {"gpu": "1"}}}) == ["/resources/limits/gpu"]


def test_amounts_are_compared_as_numbers() -> None:
    assert amount("250m") == Fraction(1, 4)
    assert amount("1.5") == Fraction(3, 2)
    assert amount("1Ki") == 1024
    assert amount("2M") == 2_000_000
    assert amount("1Gi") > amount("1G")
