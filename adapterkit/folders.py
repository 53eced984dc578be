"""The old name of `adapterkit.lint`, for scripts that run ``python -m adapterkit.folders``."""

import sys

from adapterkit.deprecation import DEPRECATIONS
from adapterkit.lint.folders import main

if __name__ == "__main__":
    print(f"warning: {DEPRECATIONS['python -m adapterkit.folders'].sentence}", file=sys.stderr)
    sys.exit(main())
