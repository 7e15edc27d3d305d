"""What a project's pod is made of: the operator's template, and what rdev always sets."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rdev.adapters.kubernetes.template import pod_of, read_template, volume_of
from rdev.domain.errors import RdevError
from rdev.domain.projects import ProjectDefinition
from tests.adapters.kubernetes.test_places import project
from tests.deploy.conftest import DEPLOY

BARE = """
apiVersion: v1
kind: Pod
metadata: {}
spec:
  containers:
    - name: project
      image: busybox
"""
CLAIM = """
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: any}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 1Gi}}
"""


def template_of(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "template.yaml"
    file.write_text(text)
    return read_template(file)


def made(template: Any, **definition: object) -> dict[str, Any]:
    pod = pod_of(template, project(**definition), "there")  # type: ignore[arg-type]
    return msgspec.convert(pod, dict[str, Any])


def test_the_built_in_template_is_the_one_that_is_shown() -> None:
    shown = DEPLOY / "k8s" / "project" / "pod.yaml"
    assert read_template(None) == read_template(shown)


def test_names_labels_and_mounts_are_always_set() -> None:
    pod = made(read_template(None), image="debian:12", env={"A": "$(B)", "HOME": "/h"})
    metadata, spec = pod["metadata"], pod["spec"]
    assert (metadata["name"], metadata["namespace"]) == ("project-demo", "there")
    assert metadata["labels"] == {
        "rdev.orchard9.ai/project": "true",
        "rdev.orchard9.ai/project-id": "demo",
        "app.kubernetes.io/managed-by": "rdev",
    }
    assert metadata["annotations"]["rdev.orchard9.ai/project-uid"] == "u-1"
    (container,) = spec["containers"]
    assert container["image"] == "debian:12"
    assert container["env"] == [{"name": "A", "value": "$$(B)"}, {"name": "HOME", "value": "/h"}]
    claims = [one for one in spec["volumes"] if "persistentVolumeClaim" in one]
    assert [one["persistentVolumeClaim"]["claimName"] for one in claims] == ["project-demo"]


def test_what_a_template_says_nothing_of_is_hardened_and_mounted(tmp_path: Path) -> None:
    pod = made(template_of(tmp_path, BARE + CLAIM))
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert volumes[mounts["/workspace"]]["persistentVolumeClaim"] == {"claimName": "project-demo"}
    assert "emptyDir" in volumes[mounts["/run/rdev"]]


def test_what_a_template_says_stays(tmp_path: Path) -> None:
    text = BARE.replace("metadata: {}", "metadata: {labels: {team: a}}").replace(
        "spec:\n", "spec:\n  runtimeClassName: gvisor\n  securityContext: {runAsUser: 7}\n"
    )
    pod = made(template_of(tmp_path, text))
    assert pod["spec"]["runtimeClassName"] == "gvisor"
    assert pod["spec"]["securityContext"]["runAsUser"] == 7
    assert pod["metadata"]["labels"]["team"] == "a"


def test_without_a_claim_there_is_no_volume_of_its_own(tmp_path: Path) -> None:
    template = template_of(tmp_path, BARE)
    assert volume_of(template, project(), "there") is None
    assert all("persistentVolumeClaim" not in one for one in made(template)["spec"]["volumes"])


def test_resources_are_those_of_the_request(tmp_path: Path) -> None:
    asked = {"requests": {"cpu": "3", "storage": "7Gi"}, "limits": {"memory": "1Gi"}}
    template = template_of(tmp_path, BARE + CLAIM)
    (container,) = made(template, resources=asked)["spec"]["containers"]
    # No default below what was asked, or above it.
    assert container["resources"] == {"requests": {"cpu": "3"}, "limits": {"memory": "1Gi"}}
    volume = volume_of(template, project(resources=asked), "there")
    assert msgspec.convert(volume, dict[str, Any])["spec"]["resources"]["requests"] == {
        "storage": "7Gi"
    }


def test_the_template_itself_is_never_changed() -> None:
    template = read_template(None)
    made(template, image="debian", git_url="https://g.example/a", env={"A": "b"})
    assert template == read_template(None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: [", "project template"),
        ("", "needs one Pod"),
        (BARE + "---" + BARE, "needs one Pod"),
        (BARE + CLAIM + CLAIM, "more than one"),
        (BARE + "---\nkind: Secret\n", "Secret"),
        ("kind: Pod\nspec: {containers: []}", "spec.containers"),
        ("kind: Pod\nspec: [1]", "spec: must be an object"),
        (BARE.replace("spec:", "spec:\n  shareProcessNamespace: true"), "shareProcessNamespace"),
        (
            BARE + "      volumeMounts: [{name: a, mountPath: /run/rdev}]\n"
            "  volumes: [{name: a, hostPath: {path: /x}}]\n",
            "/run/rdev: must be an emptyDir",
        ),
        (
            BARE + "      volumeMounts: [{name: a, mountPath: /workspace}]\n"
            "  volumes: [{name: a, emptyDir: {}}]\n" + CLAIM,
            "/workspace: must be the persistentVolumeClaim",
        ),
        (
            BARE + "      volumeMounts: [{name: a, mountPath: /workspace}]\n"
            "  volumes: [{name: a, persistentVolumeClaim: {claimName: one}}]\n",
            "must be in the template",
        ),
        (BARE + "      volumeMounts: [{name: b, mountPath: /x}]\n", "there is no volume 'b'"),
    ],
)
def test_a_template_that_no_project_can_be_made_of_is_refused(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(RdevError, match="project template") as caught:
        template_of(tmp_path, text)
    assert told in caught.value.message


def test_a_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RdevError, match="No such file"):
        read_template(tmp_path / "none")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a branch and a tag beside the default branch."""
    folder = tmp_path / "origin"
    folder.mkdir()
    for argv in (
        ["init", "-q", "-b", "main"],
        ["commit", "-q", "--allow-empty", "-m", "one"],
        ["tag", "v1"],
        ["checkout", "-q", "-b", "feature"],
    ):
        git(folder, *argv)
    (folder / "new").write_text("on feature")
    git(folder, "add", "new")
    git(folder, "commit", "-q", "-m", "two")
    git(folder, "checkout", "-q", "main")
    return folder


def git(folder: Path, *argv: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    done = subprocess.run(
        ["git", *who, *argv], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_nothing_in_a_clones_words_is_expanded() -> None:
    """A branch may be called so; the kubelet would put another variable's value there."""
    url, ref = "https://g.example/$(HOME)", "a$(HOME)"
    definition = ProjectDefinition(id=project().id, git_url=url, git_ref=ref)
    asked = replace(project(), definition=definition)
    pod = msgspec.convert(pod_of(read_template(None), asked, "there"), dict[str, Any])
    (container,) = pod["spec"]["initContainers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert env["RDEV_GIT_URL"] == "https://g.example/$$(HOME)"
    assert env["RDEV_GIT_REF"] == "a$$(HOME)"


def clone(workspace: Path, repository: Path, ref: str | None) -> None:
    """Run the init container's own command here."""
    definition = ProjectDefinition(id=project().id, git_url="https://g.example/a", git_ref=ref)
    asked = replace(project(), definition=definition)
    pod = msgspec.convert(pod_of(read_template(None), asked, "there"), dict[str, Any])
    (container,) = pod["spec"]["initContainers"]
    assert container["workingDir"] == "/workspace"
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    env = {one["name"]: one["value"] for one in container["env"]}
    env |= {"RDEV_GIT_URL": str(repository), "PATH": "/usr/bin:/bin", "HOME": str(workspace)}
    subprocess.run(container["command"], cwd=workspace, env=env, check=True)


@pytest.mark.parametrize(
    ("ref", "files"), [(None, []), ("main", []), ("feature", ["new"]), ("v1", [])]
)
def test_a_repository_is_cloned_once(
    tmp_path: Path, repository: Path, ref: str | None, files: list[str]
) -> None:
    workspace = tmp_path / "workspace"
    (workspace / "lost+found").mkdir(parents=True)
    clone(workspace, repository, ref)
    names = sorted(
        one.name for one in workspace.iterdir() if one.name not in (".git", "lost+found")
    )
    assert names == files
    (workspace / "mine").write_text("kept")
    git(repository, "commit", "-q", "--allow-empty", "-m", "later")
    head = git(workspace, "rev-parse", "HEAD")
    clone(workspace, repository, ref)
    assert git(workspace, "rev-parse", "HEAD") == head
    assert (workspace / "mine").read_text() == "kept"


def test_a_clone_that_was_cut_off_is_finished(tmp_path: Path, repository: Path) -> None:
    workspace = tmp_path / "workspace"
    (workspace / ".rdev-clone" / ".git").mkdir(parents=True)
    clone(workspace, repository, "feature")
    (workspace / "new").unlink()
    (workspace / ".git" / "rdev-unfinished").touch()
    clone(workspace, repository, "feature")
    assert (workspace / "new").read_text() == "on feature"
    assert not (workspace / ".git" / "rdev-unfinished").exists()
