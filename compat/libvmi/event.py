"""``libvmi.event``: everything of ``vmishim.libvmi.event``."""

from vmishim.libvmi.event import *  # noqa: F403
