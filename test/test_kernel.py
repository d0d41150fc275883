"""Kernel measures and kernel regression against formulas written out on Jacobians and linear models."""

from math import inf, pi

import pytest
import torch

from curvature.kernel import (
    as_matrix,
    convergence_constant,
    cosine_distance,
    eigenpairs,
    jacobian_distance,
    principal_angles,
    relative_distance,
    smallest_eigenvalue,
    target_alignment,
)
from curvature.kernel_regression import KernelRegression

N, M, C, P = 5, 3, 2, 17

pytestmark = pytest.mark.usefixtures("double")


def blocks(J, L):
    """The full kernel of Jacobians [N, C, P] and [M, C, P], entry by entry."""
    K = torch.empty(len(J), len(L), J.shape[1], L.shape[1])
    for n in range(len(J)):
        for m in range(len(L)):
            for c in range(J.shape[1]):
                for d in range(L.shape[1]):
                    K[n, m, c, d] = J[n, c] @ L[m, d]
    return K


def rotation(d, i, j, angle):
    R = torch.eye(d)
    a = torch.tensor(angle)
    R[i, i], R[i, j], R[j, i], R[j, j] = a.cos(), -a.sin(), a.sin(), a.cos()
    return R


def case(full):
    """Kernels of two Jacobians, whether over two axes or four, and their stacked Jacobians."""
    J0, Jt = (torch.randn(N, C, P) for _ in range(2))
    if full:
        return (
            [blocks(a, b) for a, b in ((J0, J0), (Jt, Jt), (Jt, J0))],
            J0.flatten(0, 1),
            Jt.flatten(0, 1),
        )
    J0, Jt = J0[:, 0], Jt[:, 0]
    return [J0 @ J0.T, Jt @ Jt.T, Jt @ J0.T], J0, Jt


def double_loop_inner(A, B):
    return sum(float(a) * float(b) for a, b in zip(A.flatten(), B.flatten(), strict=True))


# ------------------------------------------------------------------ measures


def test_as_matrix():
    J, L = torch.randn(N, C, P), torch.randn(M, C + 1, P)
    torch.testing.assert_close(as_matrix(blocks(J, L)), J.flatten(0, 1) @ L.flatten(0, 1).T)
    K = torch.randn(N, M)
    assert as_matrix(K) is K


@pytest.mark.parametrize("full", [False, True])
def test_distances(full):
    (K0, Kt, cross), *_ = case(full)
    for A, B in ((K0, Kt), (K0, cross)):
        square = double_loop_inner(B - A, B - A)
        expected = (square / double_loop_inner(A, A)) ** 0.5
        assert float(relative_distance(A, B)) == pytest.approx(expected, rel=1e-12)
        cosine = double_loop_inner(A, B) / (double_loop_inner(A, A) * double_loop_inner(B, B)) ** 0.5
        assert float(cosine_distance(A, B)) == pytest.approx(1 - cosine, rel=1e-10)
    assert float(relative_distance(K0, K0)) == float(cosine_distance(K0, K0)) == 0


def test_cosine_distance_is_accurate_where_the_cosine_is_not():
    K0 = torch.eye(2)
    Kt = torch.eye(2) + 1e-10 * torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    # cos = (1 + e^2)^(-1/2), so that the distance is e^2 / 2
    assert float(cosine_distance(K0, Kt)) == pytest.approx(0.5e-20, rel=1e-4)


def test_halves_are_measured_in_double():
    K0 = torch.eye(3, dtype=torch.bfloat16)
    assert relative_distance(K0, 2 * K0).dtype == torch.float64
    assert float(relative_distance(K0, 2 * K0)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("outputs", [None, C])
def test_alignment(full, outputs, center):
    if full and outputs is None:
        outputs = 1
    J = torch.randn(N, outputs or 1, P) + 1
    Y = torch.randn(N, *([] if outputs is None else [outputs])) + 2
    K = blocks(J, J) if full else torch.einsum("ncp,mcp->nm", J, J)
    H = torch.eye(N) - torch.ones(N, N) / N
    if full:
        H = torch.kron(H, torch.eye(outputs))
        y = Y.flatten()[:, None]
        dense = J.flatten(0, 1) @ J.flatten(0, 1).T
    else:
        y, dense = Y.reshape(N, -1), K
    target = y @ y.T
    if center:
        dense, target = H @ dense @ H, H @ target @ H
    expected = (dense * target).sum() / dense.norm() / target.norm()
    torch.testing.assert_close(target_alignment(K, Y, center), expected)
    # a kernel that is the target's has alignment one
    own = (y @ y.T).reshape(N, outputs or 1, N, outputs or 1).transpose(1, 2) if full else y @ y.T
    assert float(target_alignment(own, Y, center)) == pytest.approx(1)


def test_centring_removes_constants():
    Y = torch.randn(N, C)
    K = Y @ Y.T
    assert float(target_alignment(K + 7, Y + 3)) < 0.99
    assert float(target_alignment(K + 7, Y + 3, center=True)) == pytest.approx(1)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-3, 0.5, 1.2, pi / 2])
def test_principal_angles_of_a_rotation(angle):
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    K0 = basis @ torch.diag(torch.tensor([9.0, 7, 5, 1, 0.5, 0.25])) @ basis.T
    R = basis @ rotation(6, 2, 4, angle) @ basis.T  # turns the third eigenvector out of the top three
    found = principal_angles(K0, R @ K0 @ R.T, 3)
    torch.testing.assert_close(found, torch.tensor([0, 0, angle]), atol=1e-14, rtol=1e-9)


def test_principal_angles_several():
    d, angles = 8, [0.3, 1e-9, 1.0]
    values = torch.diag(torch.tensor([9.0, 8, 7, 1, 1, 1, 1, 1]))
    R = torch.eye(d)
    for i, angle in enumerate(angles):
        R = R @ rotation(d, i, i + 4, angle)
    basis = torch.linalg.qr(torch.randn(d, d)).Q
    K0, Kt = basis @ values @ basis.T, basis @ R @ values @ R.T @ basis.T
    torch.testing.assert_close(
        principal_angles(K0, Kt, 3), torch.tensor([1e-9, 0.3, 1.0]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(principal_angles(K0, Kt, d), torch.zeros(d), atol=1e-14, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_spectral_quantities(full):
    (K00, Ktt, Kt0), J0, Jt = case(full)
    lowest = torch.linalg.svdvals(J0)[-1] ** 2
    torch.testing.assert_close(smallest_eigenvalue(K00), lowest)
    for norm, order in (("spectral", 2), ("frobenius", "fro")):
        distance = torch.linalg.matrix_norm(Jt - J0, ord=order)
        torch.testing.assert_close(jacobian_distance(K00, Ktt, Kt0, norm), distance)
        torch.testing.assert_close(
            convergence_constant(K00, Ktt, Kt0, norm), 3 * distance / lowest.sqrt()
        )
    assert float(convergence_constant(K00, K00, K00)) == pytest.approx(0, abs=1e-5)


def test_a_constant_of_at_most_one_bounds_the_path():
    """The bounds of the docstring, by gradient flow of a quadratic model in small steps."""
    A, Q = torch.randn(4, 9), 0.01 * torch.randn(4, 9, 9)
    Q = Q + Q.mT
    y = 0.3 * torch.randn(4)

    def jacobian(theta):
        return A + Q @ theta

    def residual(theta):
        return A @ theta + torch.einsum("npq,p,q->n", Q, theta, theta) / 2 - y

    theta, h = torch.zeros(9), 1e-3
    J0, worst = jacobian(theta), 0.0
    lowest, start = smallest_eigenvalue(J0 @ J0.T), residual(theta).norm()
    for k in range(1, 2001):
        theta = theta - h * jacobian(theta).T @ residual(theta)
        J = jacobian(theta)
        worst = max(worst, float(convergence_constant(J0 @ J0.T, J @ J.T, J @ J0.T)))
        assert residual(theta).norm() <= (-4 / 9 * lowest * h * k).exp() * start
        assert theta.norm() <= 1.5 / lowest.sqrt() * start
    assert 0.01 < worst <= 1


def test_singular_kernels():
    J = torch.randn(N, 3)
    K = J @ J.T
    assert float(smallest_eigenvalue(K)) == 0
    for _ in range(10):  # rounding in float32 leaves eigenvalues of either sign
        L = torch.randn(N, 3)
        assert float(smallest_eigenvalue((L @ L.T).float())) == 0
    assert float(convergence_constant(K, 4 * K, 2 * K)) == inf
    values, _ = eigenpairs("K", K)
    assert (values[:2] == 0).all() and (values[2:] > 0).all()


def test_errors_of_measures():
    K, sick = torch.eye(N), torch.eye(N)
    sick[0, 1] = float("nan")
    skew = torch.eye(N)
    skew[0, 1] = 1
    Y = torch.randn(N)
    with pytest.raises(ValueError, match="axes of"):
        as_matrix(torch.ones(3))
    for f in (relative_distance, cosine_distance):
        with pytest.raises(ValueError, match="different data or outputs"):
            f(K, torch.eye(M))
        with pytest.raises(ValueError, match="K0 is zero"):
            f(0 * K, K)
        with pytest.raises(ValueError, match="not a number"):
            f(K, sick)
    with pytest.raises(ValueError, match="no direction"):
        cosine_distance(K, 0 * K)
    with pytest.raises(ValueError, match="int64"):
        smallest_eigenvalue(K.long())
    with pytest.raises(ValueError, match="empty"):
        smallest_eigenvalue(K[:0, :0])
    for bad, message in (
        (sick, "not a number"),
        (skew, "not symmetric"),
        (torch.ones(N, M), "with themselves"),
        (torch.diag(torch.tensor([1.0, -1.0])), "indefinite"),
    ):
        with pytest.raises(ValueError, match=message):
            smallest_eigenvalue(bad)
        if "indefinite" not in message:
            with pytest.raises(ValueError, match=message):
                target_alignment(bad, Y)
    for bad, message in (
        (torch.ones(N).long(), "one-hot"),
        (torch.ones(N + 1), "does not fit"),
        (torch.ones(N, 1, 1), "does not fit"),
        (Y / 0, "not a number"),
        (0 * Y, "zero"),
    ):
        with pytest.raises(ValueError, match=message):
            target_alignment(K, bad)
    with pytest.raises(ValueError, match="does not fit"):
        target_alignment(torch.ones(N, N, C, C), torch.ones(N, C + 1))
    with pytest.raises(ValueError, match="after centring"):
        target_alignment(K, torch.ones(N), center=True)
    steps = torch.diag(torch.arange(1.0, N + 1))
    for k in (0, N + 1):
        with pytest.raises(ValueError, match=f"1 <= k <= {N}"):
            principal_angles(steps, steps, k)
    with pytest.raises(ValueError, match="Kt: eigenvalues 2 and 3"):
        principal_angles(steps, K, 2)
    with pytest.raises(ValueError, match="norm='nuclear'"):
        jacobian_distance(K, K, K, norm="nuclear")
    with pytest.raises(ValueError, match="different data"):
        convergence_constant(K, K, torch.eye(M))
    with pytest.raises(ValueError, match="not the kernel between"):
        convergence_constant(K, K, 2 * K)


# ------------------------------------------------------------------ regression


def problem(full, outputs=C, parameters=P, test=M):
    """Jacobians of training and test inputs as matrices, their kernels, and outputs."""
    J, L = torch.randn(N, outputs, parameters), torch.randn(test, outputs, parameters)
    y, f0, g0 = torch.randn(N, outputs), torch.randn(N, outputs), torch.randn(test, outputs)
    if full:
        kernels = blocks(J, J), blocks(L, J), blocks(L, L)
        return J.flatten(0, 1), L.flatten(0, 1), kernels, y, f0, g0
    J, L = J[:, 0], L[:, 0]
    return J, L, (J @ J.T, L @ J.T, L @ L.T), y, f0, g0


def columns(y, full):
    return y.reshape(-1, 1) if full else y


def dense(K, full):
    """A full kernel [M, N, C, C] as a matrix, by loops."""
    if not full:
        return K
    return torch.cat([torch.cat(list(row), dim=1) for row in K])


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("full", [False, True])
def test_against_the_formula(full, noise):
    _, _, (K, Ks, Kss), y, f0, g0 = problem(full)
    found, covariance = KernelRegression(K, y, noise, prior=f0).predict(Ks, prior=g0, K_test=Kss)
    A, B = dense(K, full), dense(Ks, full)
    inverse = torch.linalg.inv(A + noise * torch.eye(len(A)))
    expected = columns(g0, full) + B @ inverse @ columns(y - f0, full)
    torch.testing.assert_close(found, expected.reshape(M, C))
    assert covariance.shape == Kss.shape
    torch.testing.assert_close(dense(covariance, full), dense(Kss, full) - B @ inverse @ B.T)


@pytest.mark.parametrize("parameters", [P, 4])
@pytest.mark.parametrize("full", [False, True])
def test_is_bayesian_linear_regression(full, parameters):
    """In parameter space: prior N(0, I), noise of variance nu; also with fewer parameters than data."""
    J, L, (K, Ks, Kss), y, f0, g0 = problem(full, parameters=parameters)
    noise = 0.2
    S = torch.linalg.inv(J.T @ J / noise + torch.eye(parameters))
    theta = S @ J.T @ columns(y - f0, full) / noise
    mean, covariance = KernelRegression(K, y, noise, f0).predict(Ks, g0, Kss)
    torch.testing.assert_close(mean, (columns(g0, full) + L @ theta).reshape(M, C))
    torch.testing.assert_close(dense(covariance, full), L @ S @ L.T)


@pytest.mark.parametrize("parameters", [P, 4])
@pytest.mark.parametrize("full", [False, True])
def test_is_least_squares_without_noise(full, parameters):
    """The least-squares solution of least norm; the kernel is singular with few parameters."""
    J, L, (K, Ks, Kss), y, _, _ = problem(full, parameters=parameters)
    theta = torch.linalg.lstsq(J, columns(y, full), driver="gelsd").solution
    mean, covariance = KernelRegression(K, y).predict(Ks, K_test=Kss)
    torch.testing.assert_close(mean, (L @ theta).reshape(M, C))
    rest = torch.eye(parameters) - torch.linalg.pinv(J) @ J
    torch.testing.assert_close(dense(covariance, full), L @ rest @ L.T, atol=1e-10, rtol=1e-7)


def test_one_axis_of_targets():
    _, _, (K, Ks, _), y, f0, g0 = problem(False)
    one = KernelRegression(K, y[:, 1], 0.1, f0[:, 1]).predict(Ks, g0[:, 1])
    torch.testing.assert_close(one, KernelRegression(K, y, 0.1, f0).predict(Ks, g0)[:, 1])
    assert one.shape == (M,)


@pytest.mark.parametrize("parameters", [P, 4])
@pytest.mark.parametrize("time", [0.0, 1e-3, 0.3, 2.0])
@pytest.mark.parametrize("full", [False, True])
def test_gradient_flow(full, time, parameters):
    """The flow of the linear model's parameters, solved by one matrix exponential."""
    J, L, (K, Ks, Kss), y, f0, g0 = problem(full, parameters=parameters)
    residuals = columns(f0 - y, full)
    p, c = parameters, residuals.shape[1]
    # d/dt (theta, 1) = -(J^T J theta + J^T r) for every column, as one linear system
    flow = torch.zeros(p + c, p + c)
    flow[:p, :p], flow[:p, p:] = -J.T @ J, -J.T @ residuals
    theta = torch.linalg.matrix_exp(time * flow)[:p, p:]
    mean, covariance = KernelRegression(K, y, prior=f0).predict(Ks, g0, Kss, time=time)
    torch.testing.assert_close(mean, (columns(g0, full) + L @ theta).reshape(M, C))
    # starts N(0, I) are mapped linearly by the flow
    moved = L @ torch.linalg.matrix_exp(-time * J.T @ J)
    torch.testing.assert_close(dense(covariance, full), moved @ moved.T, atol=1e-10, rtol=1e-7)


def test_gradient_flow_ends_at_the_interpolation():
    _, _, (K, Ks, Kss), y, f0, g0 = problem(True)
    fit = KernelRegression(K, y, prior=f0)
    for time in (inf, 1e9):
        for found, expected in zip(
            fit.predict(Ks, g0, Kss, time), fit.predict(Ks, g0, Kss), strict=True
        ):
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fit.predict(K, f0), y)
    torch.testing.assert_close(fit.predict(Ks, g0, time=0), g0)


def test_cut_of_small_eigenvalues():
    """Float32 kernels of few parameters: the noise below the cut would ruin the prediction."""
    J, L, _, y, _, _ = problem(False, parameters=3)
    theta = torch.linalg.lstsq(J, y).solution
    single = J.float()
    fit = KernelRegression(single @ single.T, y)
    assert int((fit.values > 0).sum()) == 3
    found = fit.predict(L.float() @ single.T)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, L @ theta, rtol=1e-4, atol=1e-4)
    K = torch.diag(torch.tensor([1.0, 0.1]))
    fit = KernelRegression(K, torch.ones(2), rtol=0.5)
    torch.testing.assert_close(fit.predict(K), torch.tensor([1.0, 0.0]))
    zero = KernelRegression(0 * K, torch.ones(2), prior=torch.zeros(2))
    torch.testing.assert_close(zero.predict(0 * K, torch.ones(2), time=3.0), torch.ones(2))


def test_errors_of_regression():
    _, _, (K, Ks, Kss), y, f0, g0 = problem(True)
    k, ks = K[..., 0, 0], Ks[..., 0, 0]
    for arguments, message in (
        ((K, y[:, 0]), r"expected \[5, 2\]"),
        ((K, torch.ones(N, C + 1)), r"expected \[5, 2\]"),
        ((k, torch.ones(N + 1)), r"expected \[5\] or \[5, C\]"),
        ((k, torch.ones(N, 1, 1)), r"expected \[5\] or \[5, C\]"),
        ((k, torch.ones(N).long()), "one-hot"),
        ((k, y / 0), "not a number"),
        ((ks, y), "with themselves"),
        ((-k, y), "indefinite"),
        ((k, y, -1.0), "noise=-1.0"),
        ((k, y, inf), "noise=inf"),
        ((k, y, 0.0, f0[:, 0]), "prior has shape"),
        ((k, y, 0.0, None, -1.0), "rtol=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            KernelRegression(*arguments)
    fit, plain = KernelRegression(K, y, prior=f0), KernelRegression(k, y)
    for regression, arguments, message in (
        (fit, (Ks,), "prediction lacks a prior"),
        (plain, (ks, g0), "regression lacks a prior"),
        (fit, (Ks, g0[:1]), "like the targets"),
        (fit, (Ks.transpose(0, 1), g0), r"expected \[M, 5, 2, 2\]"),
        (plain, (ks.T,), r"expected \[M, 5\]"),
        (plain, (ks / 0,), "not a number"),
        (plain, (ks, None, k), r"expected \[3, 3\]"),
        (fit, (Ks, g0, Kss[..., 0, 0]), r"expected \[3, 3, 2, 2\]"),
        (fit, (Ks, g0, Kss[..., :1, :1]), "number of outputs"),
        (fit, (Ks, g0, None, -1.0), "time=-1.0"),
        (KernelRegression(k, y, 0.1), (ks, None, None, 1.0), "without noise"),
    ):
        with pytest.raises(ValueError, match=message):
            regression.predict(*arguments)
