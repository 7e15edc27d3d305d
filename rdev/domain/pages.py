"""A page of a list, bounded in rows and in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Item = TypeVar("Item")

# A page ends with the row that reaches it: its body has at most so much and one row.
PAGE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """`items` in the list's order; `has_more`: others follow the last of them."""

    items: Sequence[Item]
    has_more: bool
