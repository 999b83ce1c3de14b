"""A guest's tasks, modules and sockets as Python objects: of one guest, between two looks, of many guests at once."""
