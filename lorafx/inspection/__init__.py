"""Looking inside: what became of each module, predictions, profiles, replays, the viewer."""
