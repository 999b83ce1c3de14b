"""What passes between IDS and agent, without I/O: plans, messages, handshake, session. Imports only the standard
library and ``cryptography``; used by both sides."""
