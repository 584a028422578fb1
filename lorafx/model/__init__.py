"""What is decided on the model before any graph: its modules, the sites among them, their marks."""
