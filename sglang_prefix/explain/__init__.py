"""What was decided about a decode batch, as data, as text and as a picture."""
