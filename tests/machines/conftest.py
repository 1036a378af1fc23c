"""Fixtures of the tests of rented machines."""

from rented import local, make, pod, pulls, said  # noqa: F401
