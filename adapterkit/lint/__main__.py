"""``python -m adapterkit.lint``: check adapter folders."""

import sys

from adapterkit.lint.folders import main

sys.exit(main())
