"""The page that shows what the passes made of each graph, and the exports beside it."""
