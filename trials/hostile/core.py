"""Both ends of sessions, back to back without sockets, and hostile frames between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from trials.hostile import Saboteur, Tally, every_bit
from vmishim.errors import LinkError
from vmishim.wire.keys import generate
from vmishim.wire.session import WELCOME, Initiator, Session
from vmishim.wire.sessions import Sessions

HOSTS = 3
"""How many IDSs, each with a session."""
A_TURN = 40
"""Altered versions of each genuine frame."""
BITS_EVERY = 25
"""Requests after which one has every bit flipped in turn, and its reply; and a fresh session is made."""


class _Core:
    """One agent and a few hosts.

    :raises AssertionError: a genuine frame is not taken
    """

    def __init__(self, seed: int) -> None:
        self.tally = Tally()
        self._saboteur = Saboteur(seed)
        self._agent = generate()
        self._keys = [generate() for _ in range(HOSTS)]
        self._sessions = Sessions(self._agent, {key.public for key in self._keys})
        self._served: list[bytes] = []
        self._hellos: set[bytes] = set()
        self._live: dict[int, Session] = {}
        for number in range(HOSTS):
            self._live[number] = self._greet(number)

    def turn(self, number: int) -> None:
        """Send a request and its reply, each after hostile versions of it."""
        saboteur, chance = self._saboteur, self._saboteur.random
        whole = number % BITS_EVERY == 0
        number = chance.randrange(HOSTS)
        if whole:
            self._live[number] = self._greet(number)
        host = self._live[number]
        message = chance.randbytes(chance.choice((0, 1, 60, 60, 60, 300)))
        request = host.seal(message)
        for change, frame in self._hostile(request, whole):
            self._try(change, partial(self._ask, frame, host))
        assert not self._served
        reply = self._sessions.answer(request, self._serve)
        assert self._served == [message], "the request itself was not taken"
        self._served.clear()
        for change, frame in self._hostile(reply, whole):
            self._try(change, partial(self._open, frame, host))
        assert host.open(reply) == message[::-1], "the reply itself was not taken"
        saboteur.seen += (request, reply)

    def _hostile(self, frame: bytes, whole: bool) -> Iterator[tuple[str, bytes]]:
        if whole:
            yield from (("flipped", altered) for altered in every_bit(frame))
        yield from (self._saboteur.altered(frame) for _ in range(A_TURN))

    def _try(self, change: str, meet: Callable[[], bool]) -> None:
        self.tally.changes[change] += 1
        try:
            self.tally.accepted += meet()
        except LinkError:
            pass
        except Exception:
            self.tally.crashed += 1

    def _ask(self, frame: bytes, host: Session | None) -> bool:
        """Whether the agent accepts the frame, or the IDS accepts the agent's answer."""
        answer = self._sessions.answer(frame, self._serve)
        if self._served:
            self._served.clear()
            return True
        if answer[1] == WELCOME:
            return frame not in self._hellos  # a replayed hello is welcomed, but the attacker can't use the session
        return host is not None and self._open(answer, host)

    def _open(self, frame: bytes, host: Session) -> bool:
        host.open(frame)
        return True

    def _finish(self, frame: bytes, initiator: Initiator) -> bool:
        initiator.finish(frame)
        return True

    def _serve(self, session: bytes, message: bytes) -> bytes:
        self._served.append(message)
        return message[::-1]

    def _greet(self, number: int) -> Session:
        """Make a new session, after hostile hellos and welcomes; each hostile welcome costs a handshake."""
        initiator = Initiator(self._keys[number], self._agent.public)
        hello = initiator.hello()
        self._hellos.add(hello)
        for change, frame in self._some(hello):
            self._try(change, partial(self._ask, frame, self._live.get(number)))
        welcome = self._sessions.answer(hello, self._serve)
        for change, frame in self._some(welcome):
            victim = Initiator(self._keys[number], self._agent.public)
            victim.hello()
            self._try(change, partial(self._finish, frame, victim))
        self._saboteur.seen += (hello, welcome)
        return initiator.finish(welcome)

    def _some(self, frame: bytes) -> Iterator[tuple[str, bytes]]:
        return (self._saboteur.altered(frame) for _ in range(A_TURN // 4))


def core(frames: int, seed: int) -> Tally:
    """Send at least ``frames`` hostile frames to both ends of sessions.

    :raises AssertionError: a genuine frame was not taken after hostile ones
    """
    run = _Core(seed)
    number = 0
    while run.tally.frames < frames:
        number += 1
        run.turn(number)
    return run.tally
