"""Long and destructive trials: a soak, a hostile host, fuzzing, an IDS in its own VM."""
