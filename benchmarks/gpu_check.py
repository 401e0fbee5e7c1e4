"""The command behind ``make gpu-check``: ``python -m benchmarks.gpu_check``; see ``gpu/``.

Exits with 1 where something fails, misses its goal or is not done yet, and with 2 where there is
no device.
"""

from benchmarks.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
