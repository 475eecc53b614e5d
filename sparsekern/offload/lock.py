"""One lock for all bookkeeping of this package.

Packed objects are freed wherever autograd or the garbage collector drops them, in the middle of other
bookkeeping too. With several locks two threads could each hold one and wait for the other's; with one,
re-entrant, they cannot. It is held for bookkeeping alone, never while a kernel runs, and nothing that is
done under it blocks on another lock.
"""

import threading

LOCK = threading.RLock()
