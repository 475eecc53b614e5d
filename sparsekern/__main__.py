"""``python -m sparsekern``: the same as the ``sparsekern`` command."""

from .cli import main

if __name__ == "__main__":
    main()
