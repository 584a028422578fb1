"""From a frame that Dynamo captured to an executable: the backend, the driver of the passes,
checks."""
