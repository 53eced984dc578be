"""Who else knows what a name means, when it is neither a path nor a Hub id: ``module:function``, imported when asked.

A function takes the reference and gives an object with ``shown``, ``folder``, ``file`` and ``hub`` (see
`adapterkit.registry.finder.Found`), or None. The package itself fills the list, so that this layer knows none of them.
"""

from __future__ import annotations

FINDERS: list[str] = []
