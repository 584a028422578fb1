"""A program in service: how it is made, sessions, entries, requests, locks, shared modules."""
