"""``python -m threshnet_fast.cli`` is ``threshnet-fast``."""

import sys

from . import main

sys.exit(main())
