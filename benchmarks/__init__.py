"""Time and peak memory of each extension, relative to a plain forward and backward.

``python -m benchmarks`` prints a table and stores it in ``benchmarks/results``.
"""
