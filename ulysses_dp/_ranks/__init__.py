"""The ranks: MPI, who owns what, and the two redistributions."""
