"""The papers on pruning, repeated on nets that train here: `python -m benchmarks.pruning.han` and others."""
