"""``python -m dist_vpt`` is ``dist-vpt``."""

import sys

from dist_vpt.cli.main import main

sys.exit(main())
