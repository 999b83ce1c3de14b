"""What takes longer than a test may, and hurts: a soak, a hostile host, fuzzing, an IDS in a VM of its own."""
