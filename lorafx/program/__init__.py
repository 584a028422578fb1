"""What the compiler knows of a marked model, and of one captured graph."""
