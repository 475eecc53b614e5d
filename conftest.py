"""Which modules are searched for examples: not those of what is not installed here, which cannot be imported."""

import importlib.util

_NEEDS = {"triton": "sparsekern/backends/triton/*", "transformers": "sparsekern/pruning/hf.py"}
collect_ignore_glob = [
    files for name, files in _NEEDS.items() if not importlib.util.find_spec(name)
]
