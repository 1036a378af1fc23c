"""What is done to a finished run: other exports, sensitivity."""
