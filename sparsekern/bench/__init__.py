"""`sparsekern bench`: our ops beside what else there is, on this machine.

:func:`run` measures; results.py holds what it gives, report.py and plot.py show it, compare.py sets two runs side by
side, tune.py turns the same measurements into choices. A suite is one file with ``cases(session)``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from . import formats, linear, offload, zvc
from .clock import Budget, Clock
from .results import Results
from .session import Case, Options, Session, machine

SUITES = {"linear_24": linear, "pack_24": formats, "zvc": zvc, "offload": offload}
MOST_SECONDS = 4.0  # of one case


def run(
    options: Options,
    command: str = "",
    clock: Clock | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Results:
    """Measure every case of the suites. Ctrl-C ends it early; what was measured is kept.

    Args:
        progress: called with how many cases are done, of how many, and which comes next.
    """
    # A slower back end that steps in is an error: nobody should time the reference by accident.
    before = os.environ.get("SPARSEKERN_STRICT")
    os.environ["SPARSEKERN_STRICT"] = "1"
    torch.manual_seed(options.seed)
    results = Results(machine(options.device), command)
    session = Session(options, clock or Clock(options.device), results)
    start = time.monotonic()
    work = [case for suite in options.suites for case in SUITES[suite].cases(session)]
    total, done = sum(case.weight for case in work), 0
    try:
        for done, case in enumerate(work):
            progress(done, len(work), case.label)
            # Half of the time goes into weights, warm-up and checks.
            seconds = min(MOST_SECONDS, options.minutes * 60 * case.weight / total / 2)
            _measure(session, case, Budget(options.rounds, seconds))
        done = len(work)
        progress(done, len(work), "")
    except KeyboardInterrupt:
        results.interrupted = f"{done} of {len(work)} cases"
    finally:
        if before is None:
            del os.environ["SPARSEKERN_STRICT"]
        else:
            os.environ["SPARSEKERN_STRICT"] = before
    results.seconds = time.monotonic() - start
    return results


def _measure(session: Session, case: Case, budget: Budget) -> None:
    try:
        with torch.inference_mode(not case.trains):
            session.results.rows += case.run(session, budget)
    except Exception as error:  # one broken case must not cost the others
        words = str(error).partition("\n")[0] or type(error).__name__
        session.results.failed.append(f"{case.label}: {type(error).__name__}: {words}")
