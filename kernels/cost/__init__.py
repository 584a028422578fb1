"""What a strategy costs on a chip."""
