"""Looking inside: what became of each module, predictions, profiles, the viewer."""
