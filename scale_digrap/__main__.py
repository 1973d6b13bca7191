"""``python -m scale_digrap`` is ``scale-digrap``: what torchrun starts (``torchrun … -m scale_digrap train …``)."""

import sys

from scale_digrap.cli import main

sys.exit(main())
