"""One module per way to compute a convolution's three passes, one device each.

To add an engine: write a module with a subclass of :class:`~gpuconv.engines.base.Engine` and
name it in the table of :mod:`gpuconv.dispatch`. Engines do not know each other.
"""
