"""List a guest for a long time while all in it comes and goes and the road to it fails: is every listing right?"""
