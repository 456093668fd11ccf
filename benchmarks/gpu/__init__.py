"""Entry points for a GPU host that has torch, triton and numpy, and nothing installed of ours."""
