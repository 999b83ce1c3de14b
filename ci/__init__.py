"""Checks of the project and the machines they run on."""
