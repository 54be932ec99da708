"""What a person holds: read from a file, the environment or a prompt, and never shown."""

from __future__ import annotations

import getpass
import hmac
import os
import re
import sys
import unicodedata
from contextlib import suppress
from typing import Any, NoReturn


class Hidden:
    """Bytes that are never shown: not by ``repr``, ``str`` or ``vars``, and neither pickled nor copied."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden)"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and hmac.compare_digest(self._value, other._value)

    __hash__ = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not pickled or copied, so that it reaches no file")

    def __reduce__(self) -> NoReturn:
        self.__reduce_ex__(2)


class Secret(Hidden):
    """What a person holds: a passphrase, or the bytes of a key file.

    Text is taken in Unicode's composed form (NFC), so that one passphrase is one secret on every keyboard;
    bytes that are not UTF-8 are taken as they are.

    Args:
        value: The passphrase or the bytes.

    Raises:
        ValueError: If it is empty, or no valid text.

    Example:
        >>> Secret("correct horse battery staple")
        Secret(hidden)
    """

    __slots__ = ()

    def __init__(self, value: str | bytes) -> None:
        try:
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError("the secret is no valid Unicode text") from None
        if not raw:
            raise ValueError("the secret is empty; give at least one character, better a long passphrase")
        with suppress(UnicodeDecodeError):
            raw = unicodedata.normalize("NFC", raw.decode()).encode()
        super().__init__(raw)


def read_secret(
    file: str | os.PathLike[str] | None = None,
    env: str = "KEYVEIL_SECRET",
    prompt: bool = True,
    confirm: bool = False,
) -> Secret:
    """Read the secret from a file, else from an environment variable, else from a prompt that does not echo.

    Args:
        file: A file that holds it; one newline at its end is dropped. ``None``: look at ``env``.
        env: Name of the environment variable.
        prompt: Whether to ask on the terminal if there is neither.
        confirm: Whether the prompt asks twice, as it should when anonymizing.

    Raises:
        OSError: If the file cannot be read; its name is not repeated: it may be the secret, given by mistake.
        ValueError: If there is no secret, it is empty, or the two answers differ.
    """
    if file is not None:
        try:
            with open(file, "rb") as stream:
                value = stream.read()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "unreadable"
            raise OSError(
                f"the secret file cannot be read ({reason}); give the path of a file, not the secret itself"
            ) from None
        return Secret(re.sub(rb"\r?\n\Z", b"", value))
    if env in os.environ:
        return Secret(os.fsencode(os.environ[env]))
    if not prompt or not sys.stdin.isatty():
        raise ValueError(f"there is no secret: name a secret file, set {env}, or answer the prompt on a terminal")
    what = "New secret" if "NEW" in env else "Secret"
    secret = Secret(getpass.getpass(f"{what}: "))
    if confirm and Secret(getpass.getpass(f"{what} again: ")) != secret:
        raise ValueError("the two secrets differ; nothing was done")
    return secret
