"""Checks run together, each in its time, and say what they found."""

import trio
import trio.testing

from rdev.domain.errors import ErrorCode, RdevError
from rdev.domain.findings import Finding, Level, fail, ok, warn, within
from rdev.services.doctor import Check, examine


async def _well() -> Finding:
    return ok("well")


async def _worried() -> Finding:
    return warn("so so", "look")


async def _broken() -> Finding:
    raise RdevError(ErrorCode.SERVICE_UNAVAILABLE, "refused")


async def test_findings_come_in_the_order_of_the_checks():
    found = await examine(
        {name: Check(look=_well, advice="") for name in ("third", "first", "second")}
    )
    assert list(found) == ["third", "first", "second"]


async def test_an_error_is_a_failure_with_the_advice_of_its_check():
    found = await examine({"a": Check(look=_broken, advice="mend it")})
    assert found == {"a": fail("refused", "mend it")}


async def test_a_look_with_a_defect_hides_no_other_and_no_word_of_it_is_shown():
    async def defective() -> Finding:
        raise KeyError("hidden-secret")

    found = await examine(
        {"a": Check(look=defective, advice="mend it"), "b": Check(look=_well, advice="")}
    )
    assert found == {"a": fail("the check itself failed: KeyError", "mend it"), "b": ok("well")}


async def test_what_needs_a_failed_check_is_not_asked_and_neither_is_what_needs_that():
    found = await examine(
        {
            "a": Check(look=_broken, advice=""),
            "b": Check(look=_well, advice="", needs=("a",)),
            "c": Check(look=_well, advice="", needs=("b",)),
            "d": Check(look=_well, advice=""),
        }
    )
    assert [finding.level for finding in found.values()] == [
        Level.FAIL, Level.SKIPPED, Level.SKIPPED, Level.OK,
    ]  # fmt: skip
    assert found["b"].seen == "not asked: a comes first"


async def test_a_warning_stands_in_nobodys_way():
    found = await examine(
        {
            "a": Check(look=_worried, advice=""),
            "b": Check(look=_well, advice="", needs=("a",)),
        }
    )
    assert found["b"] == ok("well")


async def test_a_check_that_hangs_is_told_and_delays_no_other(autojump_clock):
    found = await examine(
        {
            "hung": Check(look=trio.sleep_forever, advice="end it"),
            "well": Check(look=_well, advice=""),
        }
    )
    assert found["hung"] == fail("no answer within 5 s", "end it")
    assert found["well"] == ok("well")
    assert trio.current_time() < 6


async def test_all_together_have_a_bound_too(autojump_clock):
    chain = {"c0": Check(look=_slow, advice="")}
    for number in range(1, 10):
        chain[f"c{number}"] = Check(look=_slow, advice="", needs=(f"c{number - 1}",))
    began_s = trio.current_time()
    found = await examine(chain)
    assert trio.current_time() - began_s <= 15
    assert found["c0"] == ok("slow")
    assert found["c9"].level is Level.FAIL


async def _slow() -> Finding:
    await trio.sleep(4)
    return ok("slow")


def test_a_quantity_is_judged_by_its_bounds():
    def level(value: float) -> Level:
        return within(value, warn_over=1, fail_over=2, seen="", advice="").level

    assert [level(value) for value in (1, 1.1, 2, 2.1)] == [
        Level.OK, Level.WARN, Level.WARN, Level.FAIL,
    ]  # fmt: skip
    assert within(99, warn_over=1, fail_over=None, seen="", advice="").level is Level.WARN
