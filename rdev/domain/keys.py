"""Who may ask: credentials and the principals behind them."""

from dataclasses import dataclass

ADMIN_KEY_ID = "key_admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The holder of an accepted credential. `key_id` is fit for logs; the key itself never is."""

    key_id: str
