"""``libvmi.event``: everything of ``vmishim.event``."""

from vmishim.event import *  # noqa: F403
