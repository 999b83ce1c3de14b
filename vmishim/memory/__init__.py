"""Guest memory: one contract (``reader``), and what answers it: the agent, its snapshots, a RAM file."""
