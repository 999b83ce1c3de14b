"""Coverage-guided fuzzing of everything that takes bytes from somebody else: ``python -m ci.fuzz TARGET --time S``."""
