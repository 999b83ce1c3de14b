"""Two ends of one session, back to back in memory."""

from __future__ import annotations

from vmishim.wire.keys import PrivateKey, generate
from vmishim.wire.session import Initiator, Responder, Session


class Pair:
    """A host and an agent that have just shaken hands.

    :ivar host: the host's end of the session
    :ivar agent: the agent's end
    """

    def __init__(self, host_key: PrivateKey | None = None, agent_key: PrivateKey | None = None) -> None:
        self.host_key, self.agent_key = host_key or generate(), agent_key or generate()
        initiator = Initiator(self.host_key, self.agent_key.public)
        self.hello = initiator.hello()
        self.welcome, self.agent, _ = Responder(self.agent_key, {self.host_key.public}).accept(self.hello)
        self.host: Session = initiator.finish(self.welcome)

    def ask(self, message: bytes) -> bytes:
        """What the agent gets when the host asks ``message``."""
        return self.agent.open(self.host.seal(message))

    def reply(self, message: bytes) -> bytes:
        """What the host gets when the agent replies ``message``."""
        return self.host.open(self.agent.seal(message))
