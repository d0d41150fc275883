"""Training compared: natural-gradient optimizers against SGD and AdamW, on four small tasks.

A convolutional network and a ViT on scikit-learn's digits, a character GPT on the source text of
Python's standard library, and a graph network on synthetic molecules. Every optimizer is tuned by the
same number of trials of random search, then trained from several seeds, in float32 and in pure
bfloat16. Nothing is downloaded.

.. code-block:: console

    $ python -m examples.training search      # results/search.jsonl, results/found.json
    $ python -m examples.training compare     # results/runs.jsonl, then the report
    $ python -m examples.training report      # results/tables.rst, results/*.png

Each trial and each run is saved as it ends. A command that was interrupted goes on where it was.
"""

from importlib.util import find_spec

missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
if missing:
    raise ImportError(
        f"examples.training needs {', '.join(missing)}: pip install 'backpack-ext[demo]', "
        "or pip install -e '.[demo]' in the repository."
    )
