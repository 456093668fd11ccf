"""What is measured: our kernels and those of other projects, one file each."""
