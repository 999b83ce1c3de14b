"""The protocol between IDS and agent, without I/O: plans, messages, handshake, session. Used by both sides; imports
only the standard library and ``cryptography``."""
