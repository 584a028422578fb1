"""From a frame that Dynamo captured to an executable: the driver of the passes and its ways in."""
