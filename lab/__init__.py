"""The lab VM: a Debian guest with a container to monitor, for tests."""
