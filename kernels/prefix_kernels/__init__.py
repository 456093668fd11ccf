"""Executors of pack plans, the merge, and the oracle. Needs torch and numpy, nothing of SGLang."""
