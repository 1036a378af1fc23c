"""Sweeps on other machines: a cluster, a rented one."""
