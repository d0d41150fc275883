"""Time and peak memory of each extension, relative to a plain forward and backward.

``python -m benchmarks`` prints tables and stores them in ``benchmarks/results``. ``benchmarks.scaling``
fits exponents of growth, ``benchmarks.compare`` measures two commits against each other.
"""
