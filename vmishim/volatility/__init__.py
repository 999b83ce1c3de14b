"""Volatility 3 over a guest's agent: its symbols, made of the guest itself, and its memory. Nothing here imports
Volatility; what does is ``compat/volatility``, under Volatility's own licence."""
