"""Clients that the hub writes to with a call each."""

from collections.abc import Callable, Iterable

from rdev.services.stream import Frames, OfferEach


def one_by_one(offers: Iterable[Callable[[Frames], bool]]) -> OfferEach:
    """What `Outlet.together` gives; an offer that is not taken whole returns False."""
    each = list(offers)
    return lambda frames: [place for place, offer in enumerate(each) if not offer(frames)]
