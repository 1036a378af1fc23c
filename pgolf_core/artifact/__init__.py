"""The artifact file: coded arrays in checked sections."""
