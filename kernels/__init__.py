"""Custom ops, their references and the generators of their fast forms."""
