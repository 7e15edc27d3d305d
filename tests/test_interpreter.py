"""The interpreter of a server's process."""

import gc
import sys
import weakref

import pytest

from rdev.interpreter import SWITCH_S, YOUNG_MAX, calm, give_way


class Node:
    """Holds itself, once it is told to."""

    def __init__(self) -> None:
        self.me: Node | None = None


def test_a_calm_collector_still_finds_cycles_and_leaves_what_was_there_alone() -> None:
    before = gc.get_threshold()
    try:
        calm()
        assert gc.get_freeze_count() > 0
        node = Node()
        node.me = node
        gone = weakref.ref(node)
        del node
        for _ in range(3 * YOUNG_MAX):
            keep = [[] for _ in range(YOUNG_MAX)]
            if gone() is None:
                break
        del keep
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_a_thread_that_computes_gives_way_soon() -> None:
    """What that does is measured: `make bench SCENARIO=scrape`."""
    before = sys.getswitchinterval()
    try:
        give_way()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
    finally:
        sys.setswitchinterval(before)
