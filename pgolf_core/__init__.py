"""pgolf: the lowest bits per byte that fits in N bytes."""
