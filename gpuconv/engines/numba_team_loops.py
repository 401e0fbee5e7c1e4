"""How workers take shares from a counter, compiled; see :mod:`gpuconv.engines.numba_team`.

The *box* is memory that all of them see, a cache line for each of: the ticket, the job, the number
of shares done, and for every helper whether it is awake and whether it should return.

The ticket is one number, so that a share is taken with all that belongs to it or not at all: the
job's number, workers, shares, and the next share. A helper that comes late finds nothing to take.
"""

from __future__ import annotations

from typing import Any

from numba import cfunc

from gpuconv.engines.numba_kept import kept, named
from gpuconv.engines.numba_memory import STAMP, add, call, exchange, load, pause, replace, store

__all__ = ["WORDS", "alone", "begin", "finished", "interrupt", "job", "lead", "serve"]

#: Eight-byte words of a box for 62 workers.
WORDS = 8 * 64
# Where the parts begin, in bytes.
_JOB, _DONE, _HELPERS = 64, 128, 192
# The fields of a ticket, from the lowest: next share, shares, workers, number of the job.
_COUNT, _WORKERS, _NUMBER = 16, 32, 40


_jobs: list[Any] = []


def job(function: Any, *made_of: object) -> int:
    """Return the address of a job, compiled now; kept on disk where there is a place for it.

    For ``made_of`` see :func:`gpuconv.engines.numba_kept.named`.
    """
    signature = "void(int64, int64, int64, int64)"
    options = {"boundscheck": False, "error_model": "numpy"}
    named(function, *made_of, STAMP)
    try:
        made = cfunc(signature, cache=True, **options)(function)
    except (OSError, RuntimeError):  # nowhere to keep it
        made = cfunc(signature, **options)(function)
    _jobs.append(made)
    return int(made.address)


@kept(STAMP)
def _work(box, worker):
    """Take shares until there are none; return whether there were any."""
    some = False
    while True:
        ticket = load(box)
        share, count = ticket & 0xFFFF, ticket >> _COUNT & 0xFFFF
        if share >= count or worker >= ticket >> _WORKERS & 0xFF:
            return some
        if replace(box, ticket, ticket + 1):
            # The job stays what it is until this share is done.
            call(load(box + _JOB), load(box + _JOB + 8), share, count, worker)
            add(box + _DONE, 1)
            some = True


@kept(STAMP)
def begin(box, function, job, count, workers):
    """Begin a job; return the helpers that are asleep, a bit each."""
    store(box + _JOB, function)
    store(box + _JOB + 8, job)
    store(box + _DONE, 0)
    number = (load(box) >> _NUMBER) + 1 & 0x7FFFFF
    store(box, number << _NUMBER | workers << _WORKERS | count << _COUNT)
    asleep = 0
    for helper in range(workers - 1):
        if exchange(box + _HELPERS + 64 * helper, 1) == 0:
            asleep |= 1 << helper
    return asleep


@kept(STAMP)
def finished(box, count, spins):
    """Wait a while for so many shares; return whether they are done."""
    while spins > 0 and load(box + _DONE) < count:
        pause()
        spins -= 1
    return load(box + _DONE) >= count


@kept(STAMP)
def lead(box, count, spins):
    """Take shares of the job that was begun, and wait a while for the others'."""
    _work(box, 0)
    return finished(box, count, spins)


@kept(STAMP)
def serve(box, helper, spins):
    """Look for shares until there have been none for a while, or somebody interrupts."""
    state = box + _HELPERS + 64 * helper
    exchange(state, 1)
    left = spins
    while left > 0 and load(state + 8) == 0:
        if _work(box, helper + 1):
            left = spins
        else:
            pause()
            left -= 1
    store(state + 8, 0)
    exchange(state, 0)
    # Whoever began a job before that line takes this helper for awake.
    _work(box, helper + 1)


@kept(STAMP)
def interrupt(box, helper):
    """Let a helper return."""
    store(box + _HELPERS + 64 * helper + 8, 1)


@kept(STAMP)
def alone(function, job, count):
    """Run all shares of a job here."""
    for share in range(count):
        call(function, job, share, count, 0)
