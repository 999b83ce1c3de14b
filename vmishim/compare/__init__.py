"""``vmishim compare``: one unchanged LibVMI script on every road to the same guest, its answers and its costs.

`recorder` runs the script in a process of its own and writes down every call; `roads` says which ways to a guest there
are; `engine` runs them in an order that tells memory that moved from answers that are wrong; `verdict` compares;
`report` shows.
"""
