"""Breaks the kernels, one small change at a time, and counts how often the checks notice.

    python -m tests.mutation                     # every change of every file of kernels/
    python -m tests.mutation --sample 40         # forty of each file, chosen by --seed
    python -m tests.mutation --file conv_atomic.cu

The changes (mutants) follow from the text by rule (``rules.py``): a comparison flipped, a barrier
or a wait dropped, an index shifted by one, an atomic made plain, + for -, another constant, a
test of bounds left out, and the like. Each runs in a process of its own, which may be killed,
against small problems (``problems.py``, ``checks.py``) on the stand-in in its checking mode, with
bounds of local arrays watched as well: a result off the loops', a race, an access out of bounds,
an endless loop, a crash count as caught. The score of a file is caught / (all - equivalent);
equivalent is what compiles to the same machine code in every variant that the checks use, and
what ``survivors.toml`` lists, each entry with its reason. Each file is to reach 95 %.

What was found is kept in ``build/mutation``, so that an interrupted run goes on where it was: what
was caught until the kernel, the stand-in's runtime, or what the check launches changes; what
survived until there are other checks. ``--most-checks 8`` in a first run finds most in a third
of the time; the run without it goes on with the rest.
"""
