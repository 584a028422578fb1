"""`torch.compile(model, backend="lorafx")`: marked models that their users compile themselves."""
