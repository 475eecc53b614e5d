"""The CPU benchmark: `python -m benchmarks.cpu` at the root of the repository, or `make bench`."""
