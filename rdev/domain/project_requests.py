"""What a client may ask of a new project: `POST /projects`, parsed with all faults.

The rules are those of Kubernetes for what becomes part of a pod (names, quantities, images), so
that a request that is accepted here is not refused there. A project that is a folder takes its id
alone.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from rdev.domain.fields import Fields, Json
from rdev.domain.ids import PROJECT_MAX_BYTES, PROJECT_PATTERN, ProjectId
from rdev.domain.projects import ProjectDefinition
from rdev.domain.requests import ENV_RULE, read_env

IMAGE_MAX_BYTES: Final = 512
GIT_URL_MAX_BYTES: Final = 2_048
GIT_REF_MAX_BYTES: Final = 244
QUANTITY_MAX_BYTES: Final = 32

# A reference of an image. Source: distribution/reference, with its parts in order: registry, path,
# tag, digest.
_PART: Final = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_HOST: Final = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?(?::[0-9]{1,5})?"
IMAGE: Final = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
# No credentials within: the address is stored and stands in the pod for everyone to read.
GIT_URL: Final = re.compile(
    r"(?:https?://|ssh://(?:[A-Za-z0-9._-]{1,64}@)?)[A-Za-z0-9][A-Za-z0-9.-]{0,252}(?::[0-9]{1,5})?"
    r"/[!#-&(-;=?-\[\]_a-z~-]{1,1024}"
)
# A branch, a tag or a commit. Narrower than git-check-ref-format, and never an option.
GIT_REF: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/+-]{0,242}[A-Za-z0-9_+-])?")
# A quantity above zero. Source: Kubernetes API conventions, "Quantities"; no exponents.
QUANTITY: Final = re.compile(
    r"(?=[0-9.]*[1-9])[0-9]{1,12}(?:\.[0-9]{1,3})?(?:m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
)
_SUFFIXES: Final[Mapping[str, Fraction]] = {
    "m": Fraction(1, 1_000),
    **{suffix: Fraction(10 ** (3 * step)) for step, suffix in enumerate(("", *"kMGTP"))},
    **{f"{suffix}i": Fraction(2 ** (10 * step)) for step, suffix in enumerate("KMGTP", start=1)},
}
_OF_CONTAINER: Final = ("cpu", "memory", "ephemeral-storage")
_OF_VOLUME: Final = "storage"
_POD_FIELDS: Final = ("image", "git_url", "git_ref", "env", "resources")


def parse_project(body: Json) -> ProjectDefinition:
    """`POST /projects` where projects are pods. Errors: BAD_REQUEST, all faults."""
    fields = Fields(body)
    project = _id(fields)
    image = fields.text(
        "image",
        max_bytes=IMAGE_MAX_BYTES,
        pattern=IMAGE,
        about="what the commands' container is made of; the operator's template says it else",
    )
    git_url, git_ref = _git(fields)
    env = read_env(
        fields,
        about="of the project's container, its clone and its commands, whose own wins; no secrets; "
        f"{ENV_RULE}",
    )
    resources = _resources(fields)
    fields.finish()
    assert project is not None
    return ProjectDefinition(
        id=ProjectId(project),
        image=image,
        git_url=git_url,
        git_ref=git_ref,
        env=env,
        resources=resources,
    )


def parse_folder_project(body: Json) -> ProjectDefinition:
    """`POST /projects` where projects are folders. Errors: BAD_REQUEST, all faults."""
    fields = Fields(body)
    project = _id(fields)
    for name in _POD_FIELDS:
        fields.nothing(name, why="is not supported by the local executor")
    fields.finish()
    assert project is not None
    return ProjectDefinition(id=ProjectId(project))


def amount(quantity: str) -> Fraction:
    """What a text that matches `QUANTITY` stands for."""
    number = quantity.rstrip("mkKMGTPi")
    return Fraction(number) * _SUFFIXES[quantity[len(number) :]]


def _id(fields: Fields) -> str | None:
    return fields.text("id", max_bytes=PROJECT_MAX_BYTES, required=True, pattern=PROJECT_PATTERN)


def _git(fields: Fields) -> tuple[str | None, str | None]:
    url = fields.text(
        "git_url",
        max_bytes=GIT_URL_MAX_BYTES,
        pattern=GIT_URL,
        about="cloned into the volume before the first command; https, http or ssh, no password",
    )
    ref = fields.text(
        "git_ref",
        max_bytes=GIT_REF_MAX_BYTES,
        pattern=GIT_REF,
        about="a branch, a tag or a commit of git_url; the default branch where absent",
    )
    if ref is not None and (".." in ref or "//" in ref):
        fields.fault("git_ref", "must not contain .. or //")
    if ref is not None and url is None and not fields.faults:
        fields.fault("git_ref", "needs git_url")
    return url, ref


def _resources(fields: Fields) -> Mapping[str, Mapping[str, str]]:
    inner = fields.inner("resources", about="quantities as Kubernetes writes them")
    if inner is None:
        return {}
    requests = _quantities(inner, "requests", (*_OF_CONTAINER, _OF_VOLUME))
    limits = _quantities(inner, "limits", _OF_CONTAINER)
    for name in sorted(requests.keys() & limits.keys()):
        if amount(requests[name]) > amount(limits[name]):
            fields.fault("resources", f"requests more {name} than its limit")
    found = {"requests": requests, "limits": limits}
    return {name: value for name, value in found.items() if value}


def _quantities(fields: Fields, name: str, kinds: tuple[str, ...]) -> Mapping[str, str]:
    inner = fields.inner(name, about="")
    if inner is None:
        return {}
    found = {
        kind: inner.text(
            kind,
            max_bytes=QUANTITY_MAX_BYTES,
            pattern=QUANTITY,
            about="size of the volume, when it is made" if kind == _OF_VOLUME else "",
        )
        for kind in kinds
    }
    return {kind: value for kind, value in found.items() if value is not None}
