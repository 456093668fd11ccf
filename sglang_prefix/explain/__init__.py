"""What was decided about a batch, as data, as text and as a picture."""
