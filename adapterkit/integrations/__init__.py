"""What other programs call: trainers, tracking servers, and servers that run models. Each is imported where it is used."""

SOURCES = "ADAPTERKIT_RESOLVER_SOURCES"
"""The environment variable that says where a server's plug-in may take adapters from; without it the plug-ins do nothing."""
ALIASES = "ADAPTERKIT_RESOLVE_ALIASES"
"""The environment variable that, at 0, has the plug-ins refuse aliases."""
