"""`python -m adapterkit`"""

from adapterkit.cli import main

main()
