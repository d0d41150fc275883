"""Any quantity over a whole data loader, exactly as if the data had been one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from backpack_ext.context import backpack, check_savefields
from backpack_ext.engine import redirect
from backpack_ext.extend import extend_once
from backpack_ext.extension import Extension


def collect(
    model: nn.Module,
    loss_fn: nn.Module,
    loader: Iterable,
    *extensions: Extension,
    forward: Callable[[nn.Module, nn.Module, Any], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compute quantities of the loss over all data of a loader.

    The result is that of one backward pass over all the data at once, however they are cut into
    batches, equal or not: numerators, counts and the number of loss terms are added up separately.
    For a mean loss it is the mean over all terms of the data set. Quantities per datum are
    concatenated in the loader's order. Sampled quantities (``fisher="mc"``) agree in distribution.

    The gradients of the model's parameters, and the attributes that the extensions usually set, are
    left as they were.

    Args:
        model: The model; it is extended if it is not yet. Its training mode is left alone.
        loss_fn: The loss module; it is extended if it is not yet.
        loader: Yields batches, ``(inputs, targets)`` unless ``forward`` says otherwise.
        extensions: What to compute.
        forward: ``forward(model, loss_fn, batch)`` returns the loss of a batch; by default
            ``loss_fn(model(batch[0]), batch[1])``.
        progress: Whether to show a progress bar (needs tqdm).

    Returns:
        For each extension's savefield, the results by parameter name.

    Raises:
        TypeError: If ``loss_fn`` is no module.
        ValueError: If the loader is empty, the loss has no reduction "mean" or "sum", or two
            extensions save to the same field.
        ImportError: If ``progress`` is asked for and tqdm is missing.

    Example:
        >>> import torch
        >>> from backpack_ext import KFAC
        >>> X, y = torch.arange(6.0).reshape(6, 1), torch.zeros(6, 1)
        >>> data = [(X[:4], y[:4]), (X[4:], y[4:])]
        >>> model = nn.Linear(1, 1)
        >>> found = collect(model, nn.MSELoss(), data, KFAC(fisher="exact"), progress=False)
        >>> B, A = found["kfac"]["weight"]
        >>> torch.allclose(B @ A, 2 * X.square().mean())  # as for all six at once
        True
    """
    check_savefields(extensions)
    if not isinstance(loss_fn, nn.Module):
        raise TypeError(
            f"collect: loss_fn must be a loss module such as torch.nn.CrossEntropyLoss(), got "
            f"{loss_fn!r}. A loss that no module computes goes into `forward`, tied to one with "
            "attach_loss."
        )
    if getattr(loss_fn, "reduction", None) not in ("mean", "sum"):
        raise ValueError(f'collect: {loss_fn} must have reduction "mean" or "sum".')
    mean = loss_fn.reduction == "mean"
    forward = forward or _forward
    extend_once(model), extend_once(loss_fn)
    runs = [ext.over_batches() for ext in extensions]
    totals: list[dict] = [{} for _ in runs]
    terms = 0.0
    batch_scale = 1.0

    def take(ext: Extension, store: dict, scale: float) -> None:
        nonlocal batch_scale
        batch_scale = scale if mean else 1.0
        index = next(k for k, (run, _) in enumerate(runs) if run is ext)
        ext.merge(totals[index], store, 1.0 / batch_scale)

    gradients = [(p, p.grad) for p in model.parameters()]
    batches = 0
    try:
        for batch in _bar(loader, progress):
            for p, _ in gradients:
                p.grad = None
            with redirect(take), backpack(*(run for run, _ in runs)):
                forward(model, loss_fn, batch).backward()
            terms += 1.0 / batch_scale
            batches += 1
    finally:
        for p, grad in gradients:
            p.grad = grad
    if not batches:
        raise ValueError("collect: the loader is empty.")
    scale = 1.0 / terms if mean else 1.0
    names = {id(p): name for name, p in model.named_parameters()}
    results: dict[str, dict[str, Any]] = {}
    for ext, (run, finish), total in zip(extensions, runs, totals, strict=True):
        scaled: dict = {}
        run.merge(scaled, total, scale)
        results[ext.savefield] = {names[id(p)]: finish(result) for p, result in run.finish(scaled)}
    return results


def _forward(model: nn.Module, loss_fn: nn.Module, batch) -> Tensor:
    inputs, targets = batch
    return loss_fn(model(inputs), targets)


def _bar(loader: Iterable, progress: bool) -> Iterable:
    if not progress:
        return loader
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "collect(progress=True) needs tqdm: pip install 'backpack-ext[progress]', or pass "
            "progress=False."
        ) from error
    return tqdm(loader, desc="collecting", unit="batch")
