"""`python -m adapterkit`"""

from adapterkit.cli.ending import run

run()
