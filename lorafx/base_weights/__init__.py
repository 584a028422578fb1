"""Base weights pushed into a model that is serving: names → places → plan → writes."""
