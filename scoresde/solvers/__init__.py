"""Solvers: the classes that build plans, and the published solvers by name."""
