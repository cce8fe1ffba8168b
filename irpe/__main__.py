"""``python -m irpe``: the irpe command."""

import sys

from .tools.command import main

sys.exit(main())
