"""From a frame captured by Dynamo to an executable: backend, driver of the passes, checks."""
