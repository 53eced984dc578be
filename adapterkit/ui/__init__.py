"""`adapterkit ui`: the registry as pages on the loopback interface, read-only.

``server`` speaks HTTP, ``overview`` and ``version`` hold what the pages show and how, ``graph`` draws a lineage,
``markup`` escapes. Pages come whole from here: the one script only adds comfort (copying, keys), and nothing is fetched
from anywhere else.
"""
