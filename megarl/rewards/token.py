"""The token that a reward server and those who ask it have in common: from a file or the environment, never from a command line."""

import os
from pathlib import Path

from megarl.errors import SetupError

TOKEN_VARIABLE = "MEGARL_REWARD_TOKEN"


def read_token(path: Path | None) -> str | None:
    """The bearer token: the content of `path`, else the environment's MEGARL_REWARD_TOKEN, else None.

    Raises `SetupError` for a file that cannot be read, that others may read, or that holds no one-line token; never with its content.
    """
    if path is None:
        token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        where = str(path)
        try:
            if path.stat().st_mode & 0o077:
                raise SetupError(f"{path}: the token can be read by others; run chmod 600 {path}")
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"{path}: no token can be read ({type(error).__name__})") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise SetupError(f"{where}: expected one token of printable ASCII characters without spaces")
    return token
