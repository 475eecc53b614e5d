"""Han et al. 2015 on MNIST: `python -m benchmarks.pruning.han` at the root of the repository."""
