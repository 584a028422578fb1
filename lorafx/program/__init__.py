"""What everybody reads: the program that is served, its frames, the running call and its rows."""
