"""What every option group is made of: a frozen, typed model whose field docstrings are the documentation."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class OptionGroup(BaseModel):
    """One table of a recipe. A field is declared once: flag, TOML key, `--help` and docs/options.md come from it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""
Index = Annotated[int, Field(ge=0)]
"""An integer of at least 0."""
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
"""Above 0, at most 1."""
Decay = Annotated[float, Field(ge=0, lt=1)]
"""From 0, below 1."""
