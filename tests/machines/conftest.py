"""Fixtures of the tests of rented machines."""

from support.rented import local, make, pod, pulls, said  # noqa: F401
