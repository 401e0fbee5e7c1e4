"""``python -m gpuconv``."""

import sys

from gpuconv.cli import main

sys.exit(main())
