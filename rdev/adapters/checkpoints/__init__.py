"""Checkpoints of the audit log, outside of the database."""
