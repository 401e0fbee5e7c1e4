"""Everything that needs a GPU, in one command: ``make gpu-check``.

Stages, each in its module, one after the other (``command.py``); what is done is written down at
once (``stages.py``), so that a run that was interrupted, or ran out of its ten minutes, goes on
where it was:

- ``device``: what the device is, and what it can do: copy, multiply-adds, tensor cores;
- ``checks``: the conformance suite on it, compute-sanitizer, digits trained to 0.98;
- ``timing``: the suite, each engine and each pass, beside PyTorch with cuDNN and JAX;
- ``counters``: what Nsight Compute counts in the five slowest;
- ``summary`` and ``pages``: geometric means, the Markdown page, the plots.
"""
