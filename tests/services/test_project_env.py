"""The environment that a project gives its commands."""

import itertools
from collections.abc import Mapping
from uuid import UUID

import pytest

from rdev.domain.commands import Kind
from rdev.domain.ids import ProjectId
from rdev.services.commands import Commands
from tests.fakes.depths import FakeDepths
from tests.fakes.store import ACTOR
from tests.services.scripted import PROJECT, Server, gate_of, make_project
from tests.services.test_commands import COMMON

ENV = {"A": "project", "B": "project", "GIT_SSH_COMMAND": "x"}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Kind.SHELL, {"A": "b", "B": "project", "GIT_SSH_COMMAND": "x"}),
        # What a client may not set for git it gets by no project either.
        (Kind.GIT, {"A": "b", "B": "project"}),
    ],
)
async def test_a_command_has_its_projects_env_and_its_own_wins(
    server: Server, kind: Kind, wanted: Mapping[str, str]
) -> None:
    async def env_of(project: ProjectId) -> Mapping[str, str]:
        assert project == PROJECT
        return ENV

    numbers = itertools.count(1)
    await make_project(server)
    commands = Commands(
        store=server.store,
        log=server.log,
        gate=gate_of(FakeDepths(server.state)),
        fanout=server.fanout,
        wake_workers=lambda _: None,
        reach_holder=lambda _: None,
        new_uuid=lambda: UUID(int=next(numbers)),
        env_of=env_of,
    )
    made = await commands.submit(ACTOR, PROJECT, kind, argv=("true",), common=COMMON)
    assert server.state.rows[made.command.id].new.spec.env == wanted
