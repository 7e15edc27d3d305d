"""The feeds over HTTP: `/events`, and `/projects/{id}/events` without a `stream_id`.

A client is told where it stands with `connected` already, and again with each heartbeat, so that it
can come back to the same place after any silence.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from functools import partial

import msgspec

from rdev.adapters.http.exchange import hold, principal
from rdev.adapters.http.following import RETRY_MS, Followers, WatchSubject, for_ever, last_ids
from rdev.adapters.http.plain import Asked
from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request
from rdev.domain.feed import START, FeedConnected, Position, cursor_of, parse_cursor
from rdev.domain.ids import ProjectId, is_project_id
from rdev.domain.sse import EventName, frame
from rdev.services.feed import Feed, Projects

# What a client says that wants everything from the oldest event stored.
_FROM_OLDEST = "0"
# Feeds of more than one project are counted under this label; it is no project's id.
_MANY = ProjectId("*")

_encode = msgspec.json.Encoder().encode

WatchProject = Callable[[ProjectId, str, Callable[[str], None]], AbstractContextManager[None]]


class Feeds:
    """The two feeds."""

    def __init__(
        self,
        feed: Feed,
        followers: Followers,
        check_project: Callable[[ProjectId], Awaitable[str]],
        watch_project: WatchProject,
    ) -> None:
        """`check_project` gives a project's uid, or raises NOT_FOUND; `watch_project` tells when
        that one goes (`ProjectWatch.watch`)."""
        self._feed = feed
        self._followers = followers
        self._check_project = check_project
        self._watch_project = watch_project

    async def of_all(self, asked: Asked) -> None:
        """What happens to the commands of all projects that the key may see."""
        seen = principal().project_ids
        await self._answer(asked, None if seen is None else frozenset(seen), for_ever)

    async def of_project(self, asked: Asked) -> None:
        """What happens to a project's commands, until the project is deleted. Errors: NOT_FOUND
        too."""
        text = asked.fields["project"]
        if not is_project_id(text):
            raise RdevError(ErrorCode.NOT_FOUND, f"there is no project {text!r}")
        project = ProjectId(text)
        uid = await self._check_project(project)
        watch = partial(self._watch_project, project, uid)
        await self._answer(asked, frozenset({project}), watch, project=project)

    async def _answer(
        self,
        asked: Asked,
        projects: Projects,
        watch: WatchSubject,
        *,
        project: ProjectId | None = None,
    ) -> None:
        """Check, then stream. Errors: GONE, BAD_REQUEST, SERVICE_UNAVAILABLE; none after the
        head."""
        after = _after(asked)
        begin, head = await self._feed.start(after)
        hold()
        with self._feed.subscribe(projects, after=begin, head=head) as reader:
            connected = FeedConnected(project=project, reconnecting=bool(after))
            first = frame(EventName.CONNECTED, _encode(connected), cursor_of(begin), RETRY_MS)
            await self._followers.follow(
                asked,
                reader,
                _label(projects),
                first,
                beat_id=lambda: cursor_of(self._feed.seen(reader)),
                watch_subject=watch,
            )


def _label(projects: Projects) -> ProjectId:
    """Whose events they are; one label for all watchers of the same projects, whom the hub counts
    together."""
    return _MANY if projects is None or len(projects) != 1 else next(iter(projects))


def _after(asked: Asked) -> Position | None:
    """Where the client stood; None where it says nothing. Errors: BAD_REQUEST."""
    places = [START if text == _FROM_OLDEST else parse_cursor(text) for text in last_ids(asked)]
    if None in places:
        message = (
            "Last-Event-ID (or the parameter after) must be the id of an event of a feed, or 0"
        )
        raise bad_request([Fault(pointer="", message=message)])
    return places[0] if places else None
