"""Ways to read and run the kernels for GPUs without an Intel GPU; see docs/gpu.md."""
