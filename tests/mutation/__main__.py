"""The command: ``python -m tests.mutation``; see the package."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Mutants are forked from this process: it may have no threads.
    _ONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "GPUCONV_NUM_THREADS": "1"}
    if any(os.environ.get(k) != v for k, v in _ONE.items()):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.mutation", *sys.argv[1:]],
            {**os.environ, **_ONE},
        )
    import warnings

    from tests.mutation.command import main

    warnings.simplefilter("ignore", RuntimeWarning)  # of infinities, which are meant

    raise SystemExit(main())
