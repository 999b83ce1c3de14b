"""Coverage-guided fuzzing of everything that parses untrusted bytes: ``python -m trials.fuzz TARGET --time S``."""
