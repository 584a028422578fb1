"""Ways in for others: the command line, a server, diffusers' pipelines, torch.compile."""
