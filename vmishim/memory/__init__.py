"""Guest memory: the contract of everything that reads it, kept pages, page tables, and the ELF images in it."""
