"""What compressing activations would give: `python -m benchmarks.offload` at the root of the repository."""
