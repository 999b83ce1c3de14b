"""The folder on the path of a script's child processes. It has `libvmi` alone: nothing else in it can hide a module."""
