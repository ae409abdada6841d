"""Logs: passwords and keys are masked in messages and in tracebacks."""

from __future__ import annotations

import logging

import pytest

from workers.logs import MaskingFormatter, masked


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user:hunter2@host/db",
        "redis://:hunter2@host:6379/0",
        "aws_secret_access_key=hunter2",
        "password: 'hunter2'",
        '{"token": "hunter2"}',
    ],
)
def test_secrets_are_masked(text: str) -> None:
    assert "hunter2" not in masked(text)


def test_tracebacks_are_masked_too() -> None:
    try:
        raise RuntimeError("cannot reach redis://:hunter2@host:6379/0")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), __import__("sys").exc_info())
    assert "hunter2" not in MaskingFormatter("%(message)s").format(record)
