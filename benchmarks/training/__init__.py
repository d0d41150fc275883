"""``python -m benchmarks.training``: what a whole training iteration costs with each optimizer.

An iteration clears the gradients, runs forward and backward pass, and steps. Optimizers that refresh
their curvature every ten iterations are timed over whole periods of ten, so that nothing is left out.
All times are relative to AdamW's of the same round.
"""
