"""What every group of knobs is, and the types that knobs share."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("a path that is not empty")
    return value


def _expand_user(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # "~name" of somebody this machine does not know
        raise ValueError("a path whose ~ names a user of this machine") from error


# A leading ~ is expanded; relative paths count from the current directory.
UserPath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_expand_user)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of knobs: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
