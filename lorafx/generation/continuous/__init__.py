"""Continuous batching: transformers' engine, with an adapter for each request."""
