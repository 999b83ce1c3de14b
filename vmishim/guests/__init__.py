"""What can be read: a guest by its agent, this machine, a RAM file, a dump; and how a guest's name leads to it."""
