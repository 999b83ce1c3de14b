"""The guest's kernel: its symbols and the layouts of its structures."""
