"""Acquisition of a guest's memory into a file: which memory, in which format, hashed and signed, resumable.

Headers, plans, journals and manifests are values; only `acquisition` and `output` touch the guest and the disk.
"""
