"""How many examples Hypothesis draws: few in each run, many in a long one (``pytest --hypothesis-profile=long``)."""

from __future__ import annotations

from hypothesis import settings


def profile_examples(usually: int) -> int:
    """As many as the profile wants, ``usually`` so many in the default one."""
    current = settings().max_examples
    return current if current != settings.get_profile("default").max_examples else usually
