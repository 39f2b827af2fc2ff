"""Rules that write plans: patterns of nodes, and the catalogue of published solvers by name."""
