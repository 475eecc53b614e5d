"""Which modules are searched for examples: the Triton kernels cannot be imported where there is no Triton."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["sparsekern/backends/triton/*"]
