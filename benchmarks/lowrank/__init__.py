"""``python -m benchmarks.lowrank``: spectra, eigenvectors and kernels through Gram matrices.

Four parts: the low-rank GGN against `vivit` and a matrix-free eigensolver (``spectrum``), the neural
tangent kernel against those of ``torch.func`` (``ntk``), growth with data, classes and width
(``scaling``), and the two routes to a layer's Gram matrix (``routes``).
"""
