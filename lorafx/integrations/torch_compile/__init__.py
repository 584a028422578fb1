"""`torch.compile(model, backend="lorafx")`: models that users compile themselves."""
