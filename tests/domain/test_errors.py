"""The one error type."""

from rdev.domain.errors import ErrorCode, Fault, RdevError, bad_request


def test_an_error_keeps_its_parts_and_reads_as_one_line() -> None:
    error = RdevError(
        ErrorCode.GONE, "the events are gone", retry_after_s=2.5, details={"oldest_seq": 7}
    )
    assert str(error) == "GONE: the events are gone"
    assert (error.code, error.message) == (ErrorCode.GONE, "the events are gone")
    assert (error.retry_after_s, error.details, error.faults) == (2.5, {"oldest_seq": 7}, ())
    assert RdevError(ErrorCode.CONFLICT, "no").details == {}


def test_a_bad_request_names_its_first_fault_and_counts_the_others() -> None:
    first = Fault(pointer="/a", message="is wrong")
    assert bad_request([first]).message == "/a: is wrong"
    both = bad_request([first, Fault(pointer="/b", message="too")])
    assert both.message == "/a: is wrong (and 1 more)"
    assert both.faults[1].pointer == "/b"
    assert bad_request([Fault(pointer="", message="is no JSON")]).message == "is no JSON"


def test_codes_are_their_own_names() -> None:
    assert all(code.name == code.value for code in ErrorCode)
