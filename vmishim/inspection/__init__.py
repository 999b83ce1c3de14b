"""A guest's tasks, modules and sockets as Python objects; what changes between two looks; many guests at once."""
