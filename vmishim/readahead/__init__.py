"""Reading ahead: a read of a list's head brings the list, and what is read beside its nodes is learned."""
