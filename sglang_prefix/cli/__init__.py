"""The command line `sglang-prefix`. Its modules import torch and SGLang only inside commands."""
