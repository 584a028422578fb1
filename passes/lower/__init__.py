"""lower: nodes become operators of the backend."""
