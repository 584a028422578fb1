"""The page that shows each graph after each pass, and exports."""
