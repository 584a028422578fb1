"""From what the user gives (a model, a configuration, adapters) to a marked model."""
