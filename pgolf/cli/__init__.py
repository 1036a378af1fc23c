"""The command `pgolf`."""
