"""A mutation test of the security checks and of how fresh memory is: does some unit test fail when one is wrong?"""
