"""What is logged is text: an error in a log record holds all that its traceback leads to.

Whoever keeps records, as pytest and collectors of logs do, would keep every policy of the functions
that were running when it was raised.
"""

from __future__ import annotations

import ast
from pathlib import Path

import entroflow

SOURCE = Path(entroflow.__file__).parent


def logged_errors(tree):
    """Lines in which a caught error is an argument of a logging call."""
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        for call in (node for node in ast.walk(handler) if isinstance(node, ast.Call)):
            function = call.func
            is_log = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "log"
            names = [given.id for given in call.args if isinstance(given, ast.Name)]
            if is_log and handler.name in names:
                yield call.lineno


def test_no_error_is_an_argument_of_a_log_record():
    faults = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in logged_errors(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not faults, faults
