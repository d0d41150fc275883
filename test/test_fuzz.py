"""Some hundred random nets against the dense definitions.

`FUZZ_NETS=4000` draws more of them, `FUZZ_SEED=17` that one only; `python test/fuzz.py 17` prints it.
"""

import os
from collections import Counter

import pytest
from fuzz import STEPS, draw
from fuzz_oracle import Disagreement, compare

from backpack_ext import UnsupportedError

NETS = int(os.environ.get("FUZZ_NETS", 400))
SEEDS = [int(os.environ["FUZZ_SEED"])] if "FUZZ_SEED" in os.environ else range(NETS)
CHUNK = 20
CHUNKS = [SEEDS[k : k + CHUNK] for k in range(0, len(SEEDS), CHUNK)]

# What the library documents as not supported and the generator may draw nevertheless: part of the
# message. Such nets are skipped and counted.
DOCUMENTED: tuple[str, ...] = ()

# How many nets of 400 have to contain a thing at least.
AT_LEAST = {
    "Conv1d": 25,
    "Conv2d": 8,
    "ConvTranspose": 6,
    "groups": 15,
    "padding mode": 15,
    "Embedding": 50,
    "EmbeddingBag": 3,
    "LayerNorm": 20,
    "RMSNorm": 8,
    "GroupNorm": 20,
    "InstanceNorm": 6,
    "BatchNorm": 50,
    "MultiheadAttention": 10,
    "TransformerEncoderLayer": 10,
    "TransformerDecoderLayer": 10,
    "functional attention": 12,
    "RNN": 8,
    "GRU": 8,
    "LSTM": 8,
    "cell in a loop": 15,
    "Linear in a loop": 10,
    "bilinear": 25,
    "bare_matrix": 30,
    "bare_conv": 4,
    "layer_scale": 30,
    "class token": 15,
    "position embedding": 20,
    "parametrised": 20,
    "tied modules": 15,
    "tied modules with biases": 15,
    "tied embedding": 12,
    "module called twice": 100,
    "residual": 45,
    "checkpoint": 12,
    "in-place activation": 120,
    "flattened tokens": 25,
    "sequence-first": 70,
    "layer with an axis of its own": 15,
    "linear over tokens": 5,
    "frozen parameter": 120,
    "unused module": 20,
    "two losses": 25,
    "cross-entropy": 130,
    "MSE": 70,
    "BCE": 70,
    "mean": 130,
    "sum": 130,
    "ignore_index": 40,
    "class weights": 35,
    "label smoothing": 35,
    "probability targets": 25,
    "reshaped logits": 130,
    "loss factor": 130,
}

agreed: set[int] = set()
skipped: dict[int, str] = {}
kinds: Counter[str] = Counter()
blocks: Counter[str] = Counter()


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_nets_agree(seeds):
    failures = []
    for seed in seeds:
        case = draw(seed)
        try:
            found = compare(case)
        except UnsupportedError as error:
            if not any(part in str(error) for part in DOCUMENTED):
                failures.append(f"seed {seed}: {error!r}")
            skipped[seed] = str(error)
            continue
        except (Disagreement, RuntimeError, ValueError, TypeError, AttributeError) as error:
            failures.append(f"seed {seed}: {error!r}")
            continue
        agreed.add(seed)
        kinds.update(case.kinds)
        blocks.update(found)
    assert not failures, "\n".join([*failures, "Reproduce one with `python test/fuzz.py SEED`."])


def test_enough_nets_of_each_kind():
    if len(agreed) + len(skipped) < 400:
        pytest.skip("after the whole table only")
    assert len(agreed) >= 300, skipped
    few = {k: kinds[k] for k, least in AT_LEAST.items() if kinds[k] < least}
    assert not few
    never = {make.__name__ for makes in STEPS.values() for make in makes} - kinds.keys()
    assert not never
    assert blocks["Kronecker"] > 8000 and blocks["KroneckerSum"] > 100
