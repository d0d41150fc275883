"""How models may be trained: each way tried with each quantity, on four small networks."""
