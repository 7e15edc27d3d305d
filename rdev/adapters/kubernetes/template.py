"""What a project's pod and volume are made of: the operator's template, and what rdev always sets.

The template is a file with a Pod and, where projects are to have volumes, a PersistentVolumeClaim,
as in deploy/k8s/project/pod.yaml. It is taken as it is, whatever version of Kubernetes it is for,
except for names, labels, the commands' container and the mounts it needs; what it says nothing of
is hardened. Pure, but for `read_template`.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.pods import CONTAINER_ANNOTATION, LABEL_PREFIX, folders_said
from rdev.domain.projects import Project, ProjectDefinition

Tree = dict[str, object]

MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "rdev"
CLONE: Final = "rdev-clone"
_WORKSPACE_VOLUME: Final = "rdev-workspace"
_COMMANDS_VOLUME: Final = "rdev-commands"
_DOCUMENTS: Final = re.compile(r"^---[ \t]*(?:#.*)?$", re.MULTILINE)
_BUILT_IN: Final = Path(__file__).with_name("project.yaml")

# Of a container and of a pod, where the template says nothing.
_CONTAINER_SECURITY: Final[Tree] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
_POD_SECURITY: Final[Tree] = {
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_RESOURCES: Final[Tree] = {
    "requests": {"cpu": "250m", "memory": "512Mi"},
    "limits": {"cpu": "2", "memory": "4Gi"},
}

# Once for each volume: what stands there already is left alone, and a clone that was cut off is
# made again. `.git` comes by rename, with a mark on it until the files are there.
_CLONE_SCRIPT: Final = """\
set -eu
if [ -e .git ] && [ ! -e .git/rdev-unfinished ]; then exit 0; fi
if [ ! -e .git ]; then
  rm -rf .rdev-clone
  git clone -q --no-checkout -- "$RDEV_GIT_URL" .rdev-clone
  : > .rdev-clone/.git/rdev-unfinished
  mv .rdev-clone/.git .git
  rm -rf .rdev-clone
fi
if [ -n "$RDEV_GIT_REF" ]; then git checkout -q -f "$RDEV_GIT_REF" --
else git checkout -q -f HEAD; fi
rm .git/rdev-unfinished
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectTemplate:
    """A template that was judged. `volume` None: projects have no volume of their own."""

    pod: Tree
    volume: Tree | None


def read_template(path: Path | None) -> ProjectTemplate:
    """The operator's template, else the one that comes with rdev.

    Blocks: on a small file. Errors: BAD_REQUEST, naming the file and all that is wrong with it.
    """
    file = path or _BUILT_IN
    try:
        text = file.read_text("utf-8")
        parts = [part for part in _DOCUMENTS.split(text) if part.strip()]
        documents = [msgspec.yaml.decode(part) for part in parts]
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise RdevError(ErrorCode.BAD_REQUEST, f"project template {file}: {error}") from error
    found = [one for one in documents if one is not None]
    faults = list(_faults(found))
    if faults:
        told = "; ".join(faults)
        raise RdevError(ErrorCode.BAD_REQUEST, f"project template {file}: {told}")
    kinds: dict[object, Tree] = {one["kind"]: one for one in found}
    return ProjectTemplate(pod=kinds["Pod"], volume=kinds.get("PersistentVolumeClaim"))


def _faults(documents: Sequence[object]) -> Iterator[str]:
    """What is wrong with a template. It is judged by trying: a project is made of it."""
    kinds = [one.get("kind") if isinstance(one, dict) else None for one in documents]
    if kinds.count("Pod") != 1:
        yield "needs one Pod"
    if kinds.count("PersistentVolumeClaim") > 1:
        yield "has more than one PersistentVolumeClaim"
    for kind in kinds:
        if kind not in ("Pod", "PersistentVolumeClaim"):
            yield f"holds {kind}, which is neither a Pod nor a PersistentVolumeClaim"
    pods = [one for one in documents if isinstance(one, dict) and one.get("kind") == "Pod"]
    if len(pods) == 1:
        try:
            yield from _pod_faults(pods[0], has_volume="PersistentVolumeClaim" in kinds)
        except _ShapeError as error:
            yield str(error)


def _pod_faults(pod: Tree, *, has_volume: bool) -> Iterator[str]:
    spec = _tree(pod, "spec")
    container = _commands_container(copy.deepcopy(pod))
    if spec.get("shareProcessNamespace"):
        yield "shareProcessNamespace: a container that was restarted could not be told from before"
    volumes = {one.get("name"): one for one in _trees(spec, "volumes")}
    home, commands = _folders(pod)
    mounts = {one.get("mountPath"): one.get("name") for one in _trees(container, "volumeMounts")}
    for path, name in mounts.items():
        if name not in volumes:
            yield f"{path}: there is no volume {name!r}"
    kept = volumes.get(mounts.get(commands), {"emptyDir": {}})
    if commands in mounts and "emptyDir" not in kept:
        yield f"{commands}: must be an emptyDir, which goes with the pod"
    work = volumes.get(mounts.get(home), {})
    if home in mounts and has_volume and "persistentVolumeClaim" not in work:
        yield f"{home}: must be the persistentVolumeClaim, since there is one"
    if not has_volume and "persistentVolumeClaim" in work:
        yield f"{home}: its PersistentVolumeClaim must be in the template"


def pod_of(template: ProjectTemplate, project: Project, namespace: str) -> Tree:
    """The pod of a project."""
    definition = project.definition
    pod = copy.deepcopy(template.pod)
    container = _commands_container(pod)
    metadata, spec = _tree(pod, "metadata"), _tree(pod, "spec")
    _name(metadata, project, namespace)
    _tree(metadata, "labels")[f"{LABEL_PREFIX}/project"] = "true"
    _tree(metadata, "annotations")[CONTAINER_ANNOTATION] = container["name"]
    if definition.image is not None:
        container["image"] = definition.image
    _set_env(container, definition.env)
    _set_resources(container, definition)
    _mount(template, pod, container, object_name(project))
    if definition.git_url is not None:
        home, _ = _folders(pod)
        first = [*_trees(spec, "initContainers"), _clone(container, definition, home)]
        spec["initContainers"] = first
    _harden(spec)
    pod.pop("status", None)
    return pod


def volume_of(template: ProjectTemplate, project: Project, namespace: str) -> Tree | None:
    """The volume of a project, where its template has one."""
    if template.volume is None:
        return None
    volume = copy.deepcopy(template.volume)
    _name(_tree(volume, "metadata"), project, namespace)
    size = project.definition.resources.get("requests", {}).get("storage")
    if size is not None:
        _tree(_tree(_tree(volume, "spec"), "resources"), "requests")["storage"] = size
    volume.pop("status", None)
    return volume


def object_name(project: Project) -> str:
    """What a project's pod and volume are called. At most 48 characters."""
    return f"project-{project.id}"


def _name(metadata: Tree, project: Project, namespace: str) -> None:
    metadata["name"], metadata["namespace"] = object_name(project), namespace
    for name in ("generateName", "uid", "resourceVersion", "ownerReferences", "creationTimestamp"):
        metadata.pop(name, None)
    labels = _tree(metadata, "labels")
    labels[f"{LABEL_PREFIX}/project-id"] = project.id
    labels[MANAGED_BY] = MANAGER
    _tree(metadata, "annotations")[f"{LABEL_PREFIX}/project-uid"] = project.uid


def _set_env(container: Tree, env: Mapping[str, str]) -> None:
    """Beside the template's own, or in their place. `$(…)` is nothing to expand."""
    if not env:
        return
    kept = [one for one in _trees(container, "env") if one.get("name") not in env]
    container["env"] = [*kept, *_literal(env)]


def _literal(env: Mapping[str, str]) -> list[Tree]:
    return [{"name": name, "value": value.replace("$(", "$$(")} for name, value in env.items()]


def _set_resources(container: Tree, definition: ProjectDefinition) -> None:
    resources = _tree(container, "resources")
    for kind, asked in definition.resources.items():
        for name, quantity in asked.items():
            if name != "storage":
                _tree(resources, kind)[name] = quantity
    said = {*_tree(resources, "requests"), *_tree(resources, "limits")}
    for kind in ("requests", "limits"):
        known = _tree(resources, kind)
        # A default never stands beside what is said: a limit below a request is refused.
        for default, amount in _tree(copy.deepcopy(_RESOURCES), kind).items():
            if default not in said:
                known[default] = amount


def _mount(template: ProjectTemplate, pod: Tree, container: Tree, claim: str) -> None:
    """The volume where commands begin, and the folder for what they leave behind."""
    home, commands = _folders(pod)
    work: Tree = (
        {"emptyDir": {}}
        if template.volume is None
        else {"persistentVolumeClaim": {"claimName": claim}}
    )
    volume = _mounted(pod, container, home, _WORKSPACE_VOLUME, work)
    if template.volume is not None:
        _tree(volume, "persistentVolumeClaim")["claimName"] = claim
    _mounted(pod, container, commands, _COMMANDS_VOLUME, {"emptyDir": {"sizeLimit": "4Gi"}})


def _mounted(pod: Tree, container: Tree, path: str, name: str, source: Tree) -> Tree:
    """The volume that is mounted there; where none is, one of this name and source."""
    spec = _tree(pod, "spec")
    volumes, mounts = _trees(spec, "volumes"), _trees(container, "volumeMounts")
    for mount in mounts:
        if mount.get("mountPath") == path:
            return next(one for one in volumes if one.get("name") == mount.get("name"))
    volume: Tree = {"name": name, **source}
    spec["volumes"] = [*volumes, volume]
    container["volumeMounts"] = [*mounts, {"name": name, "mountPath": path}]
    return volume


def _clone(container: Tree, definition: ProjectDefinition, home: str) -> Tree:
    """What clones the project's repository into its volume: the same image with the same rights."""
    git = {
        "RDEV_GIT_URL": definition.git_url or "",
        "RDEV_GIT_REF": definition.git_ref or "",
        # The volume belongs to its group; without a word git takes it for somebody else's.
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        "GIT_TERMINAL_PROMPT": "0",
    }
    kept = ("image", "imagePullPolicy", "envFrom", "resources", "securityContext", "volumeMounts")
    return {
        "name": CLONE,
        **{name: copy.deepcopy(container[name]) for name in kept if name in container},
        "command": ["sh", "-c", _CLONE_SCRIPT],
        "workingDir": home,
        "env": [
            *(one for one in _trees(container, "env") if one.get("name") not in git),
            *_literal(git),
        ],
    }


def _harden(spec: Tree) -> None:
    """What the template says nothing of."""
    spec.setdefault("automountServiceAccountToken", False)
    spec.setdefault("enableServiceLinks", False)
    security = _tree(spec, "securityContext")
    for name, value in copy.deepcopy(_POD_SECURITY).items():
        security.setdefault(name, value)
    for container in (*_trees(spec, "initContainers"), *_trees(spec, "containers")):
        security = _tree(container, "securityContext")
        for name, value in copy.deepcopy(_CONTAINER_SECURITY).items():
            security.setdefault(name, value)


def _commands_container(pod: Tree) -> Tree:
    """The container that commands run in: the one that the template names, else its first."""
    containers = _trees(_tree(pod, "spec"), "containers")
    wanted = _tree(_tree(pod, "metadata"), "annotations").get(CONTAINER_ANNOTATION)
    named = [one for one in containers if wanted is None or one.get("name") == wanted]
    if not named or not isinstance(named[0].get("name"), str):
        raise _ShapeError(f"spec.containers: needs {wanted or 'one with a name'}")
    return named[0]


def _folders(pod: Tree) -> tuple[str, str]:
    annotations = _tree(_tree(pod, "metadata"), "annotations")
    return folders_said({name: str(value) for name, value in annotations.items()})


class _ShapeError(Exception):
    """A part of the template is not what Kubernetes has there."""


def _tree(parent: Tree, name: str) -> Tree:
    """The object of this name, made where there is none."""
    found = parent.get(name)
    if found is None:
        found = parent[name] = {}
    if not isinstance(found, dict):
        raise _ShapeError(f"{name}: must be an object")
    return found


def _trees(parent: Tree, name: str) -> list[Tree]:
    """The objects of this list; empty where there is none."""
    found = parent.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise _ShapeError(f"{name}: must be a list of objects")
    return found
