"""Nouns and rules. Pure: no trio, no I/O, no clock, no randomness of its own."""
