"""Webhooks leave here: the address guard's network half, one HTTP exchange, Ed25519 keys."""
