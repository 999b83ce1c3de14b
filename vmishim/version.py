"""The version of this package, and of the agent that it bundles."""

__version__ = "0.1.0"
