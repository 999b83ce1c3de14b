"""Damaged guests: what the commands and the IDS examples do when a pointer in a guest's memory is wrong."""
