"""Guests: read by their agent, from a file of their memory or from a dump; this machine as a guest; names of guests."""
