"""Mutants of the read-ahead: each makes one promise of docs/freshness.md false.

Written by hand, since most are no single wrong comparison: memory that is kept too long, a head that asks too seldom.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

TESTS = (
    "test_freshness.py",
    "test_histories.py",
    "test_head.py",
    "test_store.py",
    "test_learning.py",
    "test_pieces.py",
)
"""Tests of tests/unit that must notice."""


@dataclass(frozen=True)
class Replacement:
    """One change of a module's text.

    :ivar what: what is wrong then
    :ivar old: stands in the module once
    :ivar new: takes its place
    """

    module: str
    what: str
    old: str
    new: str
    line: int = 0

    @property
    def name(self) -> str:
        """Where and what."""
        return f"{self.module}: {self.what}"

    def applied(self, text: str) -> str:
        """The module's text with the change. :raises ValueError: it does not fit"""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands in the module {text.count(self.old)} times, not once")
        return text.replace(self.old, self.new)

    def tree(self, text: str) -> ast.Module:
        """The whole module with the change. :param text: the module's source"""
        return ast.parse(self.applied(text))


_HEAD, _LISTS, _STORE = "vmishim.readahead.head", "vmishim.readahead.lists", "vmishim.readahead.store"
_READAHEAD, _COMPANIONS = "vmishim.readahead.readahead", "vmishim.readahead.companions"
_TRAILS = "vmishim.readahead.trails"

REPLACEMENTS = (
    Replacement(
        _HEAD,
        "a look in the middle of a listing is answered by its walk",
        "Event.LOOK: (_WALK, _WALK, _WALK, _WALK, _WALK)",
        "Event.LOOK: (_WALK, _WALK, _WALK, (_MOVING, Action.ANSWER), _WALK)",
    ),
    Replacement(
        _HEAD,
        "a second look is answered by the first one's walk",
        "Event.LOOK: (_WALK, _WALK, _WALK, _WALK, _WALK)",
        "Event.LOOK: (_WALK, _WALK, (_AT_HEAD, Action.ANSWER), _WALK, _WALK)",
    ),
    Replacement(
        _HEAD,
        "any look after a walk is one at a later head",
        " and thread == self.owner_thread and number > self.last_head",
        "",
    ),
    Replacement(
        _LISTS,
        "a read of a node next to the head is not noticed",
        "if apart.ranges and apart.has_neighbour(address, count) and listing.head.knows(Event.NEIGHBOUR):",
        "if False:",
    ),
    Replacement(
        _LISTS,
        "looking at the head alone forgets nothing of the walk before",
        "        self._drop(listing)\n        nodes = listing.peek",
        "        nodes = listing.peek",
    ),
    Replacement(
        _LISTS,
        "looking at the head alone leaves what another list knows of its neighbours",
        "        self.store.withdraw([node + field.offset for node in nodes for field in listing.fields])\n",
        "",
    ),
    Replacement(
        _LISTS,
        "half a walk is kept",
        "                self.tell(listing, Event.FAIL)  # half a walk is not kept\n",
        "",
    ),
    Replacement(
        _LISTS,
        "a walk does not forget the walk before",
        "        self.store.drop(listing.batch)  # not the heads that were empty: most still are\n",
        "",
    ),
    Replacement(
        _LISTS,
        "a head that became empty is read by itself",
        "return {at: words[at] for at in words.keys() & before.keys()}",
        "return {}",
    ),
    Replacement(
        _LISTS,
        "a head beyond a walk that was cut short stays known as empty",
        "        if also is None:\n            self.store.drop(listing.empty_heads)\n",
        "",
    ),
    Replacement(
        _LISTS,
        "links of another list are read in wide pieces that are older",
        "        self.store.supersede(node + listing.kernel_list.link for node in listing.snapshot.nodes[()])\n",
        "",
    ),
    Replacement(
        _LISTS,
        "a head's neighbours become known as they were, where another list's walk was later",
        "                other.apart.neighbours.refresh(words, cells)",
        "                pass",
    ),
    Replacement(
        "vmishim.readahead.walker",
        "a head that cannot be read is known as empty",
        "complete = not _report(kernel_list.name, last) and all_heads",
        "complete = True",
    ),
    Replacement(
        _LISTS,
        "a head's neighbours become known before the listing moves on",
        "return [*self._heads, *(at for each in neighbours for at in (*each.words, *each.cells))]",
        "return [*self._heads]",
    ),
    Replacement(
        _LISTS,
        "heads become known",
        "return [*self._heads, *(at for each in neighbours for at in (*each.words, *each.cells))]",
        "return [*(at for each in neighbours for at in (*each.words, *each.cells))]",
    ),
    Replacement(
        _STORE,
        "a walk leaves what another list knows of the head's neighbours",
        "        known.drop(neighbours.words, neighbours.cells)\n",
        "",
    ),
    Replacement(
        "vmishim.memory.lifetimes",
        "memory is kept for two seconds",
        "\nSTALE = 1.0\n",
        "\nSTALE = 2.0\n",
    ),
    Replacement(_STORE, "nothing expires", "            while self._batches:\n", "            while False:\n"),
    Replacement(
        "vmishim.readahead.snapshot",
        "what cannot be read is zeros",
        "some_missing = any(faults)",
        "some_missing = False",
    ),
    Replacement(
        _READAHEAD,
        "a single read that came along is never too old",
        "if self._now() >= until:",
        "if until < 0:",
    ),
    Replacement(
        _READAHEAD,
        "of two single reads that came along the older one is used",
        "max(came, key=itemgetter(1))",
        "min(came, key=itemgetter(1))",
    ),
    Replacement(
        _LISTS,
        "a new pass is answered from the trail of the one before",
        "trail.begin(self._now())\n        self.store.drop(trail.batch)",
        "trail.begin(self._now())",
    ),
    Replacement(
        _TRAILS,
        "what is met on a trail is brought in the same pass",
        "self._new[address] = 0 if len(data) == WORD and address % WORD == 0 and not text else len(data)",
        "self._words[address] = None",
    ),
    Replacement(_TRAILS, "a trail is good for ever", "return now < self._until", "return True"),
    Replacement(
        _COMPANIONS,
        "a single read that came along is used again",
        "self._brought.pop(read, None)",
        "self._brought.get(read)",
    ),
    Replacement(
        _LISTS,
        "a single read that came along outlives a flush",
        "            listing.companions.bring({}, 0.0)\n",
        "",
    ),
    Replacement(
        _READAHEAD,
        "a flush forgets nothing",
        "        self._store.clear()\n        self._chains.clear()",
        "        self._chains.clear()",
    ),
    Replacement(
        _READAHEAD,
        "a forked child keeps what its parent knew",
        "            self._pages.flush()\n        self._forget(Event.FLUSH)",
        "            self._pages.flush()",
    ),
    Replacement(
        _STORE,
        "the end of a hold forgets nothing",
        "        self.policy = self._live\n        self.clear()\n",
        "        self.policy = self._live\n",
    ),
    Replacement(
        _STORE,
        "within a hold answers are not compared with those before",
        "        data = known.overlay(address, data)\n",
        "",
    ),
    Replacement(
        _STORE,
        "within a hold newer bytes replace older ones",
        "        known.keep_first_answers(words, cells)\n",
        "",
    ),
    Replacement(
        _STORE,
        "within a hold pieces of one walk disagree",
        "        agree(words, cells)\n",
        "",
    ),
    Replacement(
        _STORE,
        "within a hold the head's own bytes are not known",
        "        self.reconcile(known, words, cells)\n        known.update(words, cells)\n",
        "",
    ),
    Replacement(
        _STORE,
        "within a hold single addresses are forgotten",
        "            self.policy.drop(self._known, words, cells)\n",
        "            self._live.drop(self._known, words, cells)\n",
    ),
    Replacement(
        _STORE,
        "within a hold batches are forgotten",
        "        self.policy.drop_batch(",
        "        self._live.drop_batch(",
    ),
    Replacement(
        _STORE,
        "within a hold wide pieces around links are forgotten",
        " if not self.held else []",
        "",
    ),
    Replacement(
        _STORE,
        "within a hold memory expires",
        '        """Never, within the hold."""\n        return math.inf\n',
        '        """Never, within the hold."""\n        return now + seconds\n',
    ),
    Replacement(
        "vmishim.readahead.pieces",
        "bytes that are laid over others are put one too far",
        "laid[low - address : high - address] = piece[low - at : high - at]",
        "laid[low - address + 1 : high - address + 1] = piece[low - at : high - at]",
    ),
)
