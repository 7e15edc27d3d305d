"""The composition root: builds everything, runs the subsystems, handles signals.

Reads top to bottom: state folder, database, adapters, services, subsystems, run.
"""
