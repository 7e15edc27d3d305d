"""Runs named checks, each in its time, and tells what they found.

Bounds: `CHECK_S` for each check, `ALL_S` for all; they run together, so one that hangs delays none.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from rdev.domain.errors import RdevError
from rdev.domain.findings import Finding, Level, fail, skipped

CHECK_S: Final = 5.0
ALL_S: Final = 15.0

# Looks at one thing. Errors: RdevError, which is told as a failure; so is a defect, by its name.
Look = Callable[[], Awaitable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`needs`: checks that must not have failed, else this one is skipped. `advice`: for when it
    fails with an error, or says nothing in time."""

    look: Look
    advice: str
    needs: tuple[str, ...] = ()


async def examine(
    checks: Mapping[str, Check], *, check_s: float = CHECK_S, all_s: float = ALL_S
) -> dict[str, Finding]:
    """Every check's finding, in the order given. A check may need only what stands before it.

    Cancellation: at once. Blocks: at most `all_s`.
    """
    found: dict[str, Finding] = {}
    over = {name: trio.Event() for name in checks}

    async def run(name: str, check: Check) -> None:
        for needed in check.needs:
            await over[needed].wait()
        broken = [needed for needed in check.needs if found[needed].level in _IN_THE_WAY]
        if broken:
            found[name] = skipped(f"not asked: {broken[0]} comes first")
        else:
            found[name] = await _within(check, check_s)
        over[name].set()

    with trio.move_on_after(all_s):
        async with trio.open_nursery() as nursery:
            for name, check in checks.items():
                nursery.start_soon(run, name, check)
    late = fail(f"nothing was found out in {all_s:g} s", "look at what it needs first")
    return {name: found.get(name, late) for name in checks}


_IN_THE_WAY: Final = frozenset({Level.FAIL, Level.SKIPPED})


async def _within(check: Check, check_s: float) -> Finding:
    with trio.move_on_after(check_s):
        try:
            return await check.look()
        except RdevError as error:
            return fail(error.message, check.advice)
        except Exception as error:  # noqa: BLE001  # one look's defect must not hide the others'
            # Without its words, which may hold what nobody should read.
            return fail(f"the check itself failed: {type(error).__name__}", check.advice)
    return fail(f"no answer within {check_s:g} s", check.advice)
