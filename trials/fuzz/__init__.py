"""Coverage-guided fuzzing of everything that takes foreign bytes: ``python -m trials.fuzz TARGET --time S``."""
