"""``vmishim compare``: one unchanged LibVMI script on every backend of the same guest, its answers and its costs.

`recorder` runs the script in a separate process and writes down every call; `backends` finds the backends of a guest;
`engine` runs the script on them in an order that tells changed memory from wrong answers; `verdict` compares;
`report` shows the result.
"""
