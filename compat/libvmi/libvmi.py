"""``libvmi.libvmi``, where some scripts import from: everything of ``vmishim.libvmi``."""

from vmishim.libvmi import *  # noqa: F403
