"""List a guest for hours while everything in it comes and goes and the network fails; check every listing."""
