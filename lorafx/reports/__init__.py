"""Reports as objects: fields, `json()`, `str()` and a table in notebooks."""
