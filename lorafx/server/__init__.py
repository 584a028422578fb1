"""`lorafx serve`: transformers' own HTTP server, and the model's name chooses the adapter."""
