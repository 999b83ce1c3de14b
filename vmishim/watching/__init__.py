"""``vmishim watch --domains``: many guests looked at again and again over sessions that stay open."""
