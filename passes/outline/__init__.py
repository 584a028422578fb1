"""outline: repeated layers become calls of one body."""
