"""The device kernels: numba-dpex sources, their compiler (build time) and their launcher (run time)."""
