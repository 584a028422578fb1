"""fuse: a base product and its delta become one node."""
