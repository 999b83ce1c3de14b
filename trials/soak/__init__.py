"""List a guest for a long time while all in it comes and goes and the network fails: is every listing right?"""
