"""The table of modules in the README is what the library says of itself."""

from pathlib import Path

import pytest
from torch import nn

from backpack_ext import support, tables
from backpack_ext.rules import RULES

README = Path(__file__).parent.parent / "README.rst"


def test_readme_has_the_table():
    text = README.read_text()
    assert tables.insert(text, support.COMMAND, support.table()) == text, "run `make tables`"


def test_every_rule_has_an_example_of_its_class():
    for cls in RULES:
        if cls.__module__.startswith("torch."):
            assert isinstance(support.EXAMPLES[cls]().module, cls)


def test_a_text_without_markers():
    with pytest.raises(ValueError, match="Expected the lines"):
        tables.insert("nothing", support.COMMAND, "")


def test_rows_are_named_briefly():
    assert support._joined(["Conv1d", "Conv2d", "Conv3d", "Linear"]) == "Conv1d-3d, Linear"
    assert support._joined(["Conv1d", "Conv3d"]) == "Conv1d, Conv3d"


def test_a_part_that_is_treated_otherwise_is_named():
    """A composite module's row refers to its parts' only where each is treated as there."""
    body = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    kinds = dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), "Kronecker")
    known = {nn.Linear: {"weight": "Kronecker", "bias": "Kronecker"}, nn.LayerNorm: None}
    assert not support._parts(body, kinds, known)
    known[nn.LayerNorm] = known[nn.Linear]
    assert support._parts(body, kinds, known)
    del known[nn.LayerNorm]
    assert not support._parts(body, kinds, known)
