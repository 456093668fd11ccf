"""Holds the stand-in `sgl_kernel`; this folder goes on PYTHONPATH, it is not imported itself."""
