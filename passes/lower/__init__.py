"""lower: nodes become what the backend runs."""
