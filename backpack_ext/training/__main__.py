"""``python -m backpack_ext.training`` prints which ways of training are right with which quantity.

With a file's name it puts the table between the two markers in that file. It takes a minute.
"""

from __future__ import annotations

from backpack_ext.tables import main
from backpack_ext.training.table import COMMAND, table

if __name__ == "__main__":
    main(COMMAND, table)
