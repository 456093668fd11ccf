"""What is measured: batches as trees, and the tensors of one decode step."""
