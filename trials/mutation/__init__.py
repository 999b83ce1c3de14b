"""A mutation test of the security checks: does some unit test fail when a check is wrong?"""
