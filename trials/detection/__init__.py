"""What ``vmishim scan`` finds in a lab VM: every attack that is planted, and none of what only looks like one."""
