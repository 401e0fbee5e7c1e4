"""CUDA through CuPy: finding, compiling and launching the sources of ``kernels/``.

This package knows arrays, devices and kernels, and no layer. CuPy is imported in one place,
:mod:`gpuconv.cuda.runtime`, and not before a CUDA array or device is in use.
"""
