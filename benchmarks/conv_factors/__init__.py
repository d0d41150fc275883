"""Input factors of convolutions by every method, and where the method chosen was not the fastest.

``python -m benchmarks.conv_factors`` measures the parts: modules here with ``CASES`` and ``run``.
"""
