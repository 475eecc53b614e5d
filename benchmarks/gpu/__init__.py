"""Everything there is to say about one GPU, by one command: `python -m benchmarks.gpu`, at the root of a clone."""
