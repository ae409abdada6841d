"""How a process logs: one line an event, with passwords taken out of whatever is logged."""

from __future__ import annotations

import logging
import os
import re
import sys
import urllib.parse
from collections.abc import Iterator

_SECRETS = (
    (re.compile(r"(\w+://[^/\s:@]*:)[^\s'\"]+@"), r"\1***@"),  # user:password@host in any URL
    (
        re.compile(
            r"(?i)((?:secret|password|token|api[_-]?key|access[_-]?key)[\w-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\",&]+"
        ),
        r"\1***",
    ),
)


_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_URL_VARIABLES = ("IMAGEMILL_DATABASE_URL", "IMAGEMILL_BROKER_URL")
_URL_PASSWORD = re.compile(r"://[^:/@]*:(.*)@", re.DOTALL)
_SHORTEST = 6  # letters; what is shorter may be part of any word


def masked(text: str) -> str:
    """The text without this process's own secrets, passwords in URLs, and values of things that are called secrets."""
    for secret in _own():
        text = text.replace(secret, "***")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _own() -> Iterator[str]:
    """The secrets in the environment, however a library may quote them."""
    found = [os.environ.get(name, "") for name in _SECRET_VARIABLES]
    for name in _URL_VARIABLES:
        found += _URL_PASSWORD.findall(os.environ.get(name, ""))
    for secret in found:
        if len(secret) >= _SHORTEST:
            yield secret
            yield urllib.parse.unquote(secret)


class MaskingFormatter(logging.Formatter):
    """Formats a record, its traceback included, and masks the result."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def configure(level: str) -> None:
    """Send all logs to stderr in one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("botocore", "boto3", "urllib3", "kombu", "amqp", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
