"""Comparison runs that users start: workloads, measurements, result files and plots."""
