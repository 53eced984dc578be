"""The old name of `adapterkit.lint`, for scripts that run ``python -m adapterkit.folders``."""

import sys

from adapterkit.lint.folders import main

if __name__ == "__main__":
    print("warning: adapterkit.folders is now adapterkit.lint; call python -m adapterkit.lint", file=sys.stderr)
    sys.exit(main())
