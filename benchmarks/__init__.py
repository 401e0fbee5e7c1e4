"""The benchmark: a suite of layers, the peers that compute them, and what is made of the times.

``suite.toml`` lists the layers; :mod:`benchmarks.suite` reads it. :mod:`benchmarks.runner` times
each layer with every peer of :mod:`benchmarks.peers`, each in a child process of its own
(:mod:`benchmarks.worker`); :mod:`benchmarks.report` and :mod:`benchmarks.plots` show the result.
``gpuconv bench`` (``make bench``) runs all of it.
"""
