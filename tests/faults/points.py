"""Named points of a server's work, where a test lets it die or stand still.

A point is `<what>.<phase>`. For a statement: `before` it is sent, `uncommitted` (done, not yet
committed), `committed` (before anybody acts on its reply). For an exec in a project: `before` it,
`opened`, and for an attachment `half_spec` (half of what it must be told was sent) and `read`
(something was read and not yet handed on). For a delivery of a webhook: `send.before` its request,
and `send.after` (the outcome came and is stored nowhere). A test arms a server by a file in its
state folder; the server fires once, says so in `fired`, and is ended or stopped by its own signal.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals

STATEMENTS = (
    "insert",
    "cancel",
    "request_cancel",
    "touch",
    "claim",
    "repair",
    "expire",
    "take_over",
    "heartbeat",
    "append",
    "finish",
    "release",
    "release_holder",
    "notify",
)
STATEMENT_POINTS = tuple(
    f"{name}.{phase}" for name in STATEMENTS for phase in ("before", "uncommitted", "committed")
)
EXEC_POINTS = (
    "attach.before",
    "attach.opened",
    "attach.half_spec",
    "attach.read",
    "kill_command.before",
    "kill_command.opened",
)
# Between the commit of an event and its request, and between that and the stored outcome.
WEBHOOK_POINTS = (
    "claim_deliveries.before",
    "claim_deliveries.uncommitted",
    "claim_deliveries.committed",
    "send.before",
    "send.after",
    "settle.before",
    "settle.uncommitted",
    "settle.committed",
)
POINTS = STATEMENT_POINTS + EXEC_POINTS


@dataclass(slots=True, kw_only=True)
class Points:
    """The points of one server; `folder` is its state folder."""

    folder: Path

    def arm(self, point: str, *, nth: int = 1, action: Signals = SIGKILL) -> None:
        """Let the server meet its signal when it comes to the point for the nth time."""
        assert point in POINTS + WEBHOOK_POINTS, point
        fresh = self.folder / "point.new"
        fresh.write_text(f"{point} {nth} {action.name}")
        fresh.rename(self.folder / "point")

    @property
    def fired(self) -> list[str]:
        """Every point that fired, in order."""
        file = self.folder / "fired"
        return file.read_text().split() if file.exists() else []

    @property
    def armed(self) -> bool:
        """Whether something is still to fire."""
        return (self.folder / "point").exists()

    def is_armed(self, point: str) -> bool:
        """Whether this is the point, and this time counts."""
        armed = self._armed()
        return armed is not None and armed[0] == point

    def reach(self, point: str) -> None:
        """In the server: it is here now."""
        armed = self._armed()
        if armed is None or armed[0] != point:
            return
        name, nth, action = armed
        if nth > 1:
            self.arm(name, nth=nth - 1, action=action)
            return
        (self.folder / "point").unlink()
        with (self.folder / "fired").open("a") as fired:
            fired.write(name + "\n")
        os.kill(os.getpid(), action)

    def _armed(self) -> tuple[str, int, Signals] | None:
        try:
            point, nth, action = (self.folder / "point").read_text().split()
        except FileNotFoundError:
            return None
        assert action in (SIGKILL.name, SIGSTOP.name)
        return point, int(nth), Signals[action]
