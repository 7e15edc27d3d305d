"""The state folder and its lock; that a killed holder frees it stands in test_embedded.py."""

import os
import re
import subprocess
from pathlib import Path
from subprocess import PIPE

import pytest

from rdev.adapters.postgres.state import LOCK_NAME, hold_state
from rdev.domain.errors import RdevError


def test_a_state_folder_is_made_private_and_freed_at_the_end(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_state(tmp_path / "deep" / "state") as folder:
            assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    named = re.escape(f"cannot use {tmp_path}/file/state")
    with pytest.raises(RdevError, match=named), hold_state(tmp_path / "file" / "state"):
        pass


def test_a_second_holder_is_refused_and_leaves_the_first_its_lock(tmp_path: Path) -> None:
    with hold_state(tmp_path):
        for _ in range(2):
            with pytest.raises(RdevError, match=f"process {os.getpid()};"), hold_state(tmp_path):
                pytest.fail("two servers have the state folder")


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with hold_state(tmp_path):
        child = subprocess.Popen(["cat"], stdin=PIPE, stdout=PIPE, close_fds=False)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        # Its answer proves that it is past the exec, which closes what it must not inherit.
        child.stdin.write(b"ready\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"ready\n"
        with hold_state(tmp_path):
            assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
