"""The parts of the scenario `queue`: rdev's queue, and other queues of PostgreSQL beside it.

Every side gets the same work on the same server: projects whose commands run one at a time, some
of them held by a command that never ends with a backlog behind it.
"""
