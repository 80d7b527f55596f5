"""Field types of settings: counts as people write them (400k, 1.5M), bytes, shares, and fields outside the identity."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_SUFFIX = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_COUNT = r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([kKmMbBgGtT]?)\s*"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"  # of a recipe, a domain, an arm, a task: it names folders too
LARGEST = 2**62  # of any count or seed: what 64-bit arithmetic holds with room to spare


def _count(value: Any) -> Any:
    """Read 400k, 1.5M, 201B, 1e6 as whole numbers; leave anything else to the type's own validation."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false (YAML reads yes, no, on, off as those)")
    match = re.fullmatch(_COUNT, value) if isinstance(value, str) else None
    if not match:
        return value
    number = Decimal(match[1]).scaleb(_SUFFIX[match[2].lower()])
    if number != number.to_integral_value():
        raise ValueError("must come to a whole number")
    return int(number)


def _bytes(value: Any) -> Any:
    """Read 1GiB, 512 MiB, 2GB as bytes; leave anything else to the type's own validation."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT])(i?)B\s*", value) if isinstance(value, str) else None
    if not match:
        return _count(value)
    power = "kMGT".index(match[2].replace("K", "k")) + 1
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


def _number(value: Any) -> Any:
    """Refuse true and false. YAML 1.1 reads 1e-4 as text, which pydantic then parses as the number that was meant."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false (YAML reads yes, no, on, off as those)")
    return value


Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=LARGEST)]
Several = Annotated[int, BeforeValidator(_count), Field(gt=0, le=1024)]  # of experts
Whole = Annotated[int, BeforeValidator(_count), Field(ge=0, le=LARGEST)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(gt=0, le=LARGEST)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Part = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Weight = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]  # of either sign
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*\S[^\x00]*$")]


def execution(default: Any, **more: Any) -> Any:
    """A field that is recorded but does not decide the result."""
    return Field(default, json_schema_extra={"execution": True}, **more)


def later(default: Any, **more: Any) -> Any:
    """A field of a step or of settings that is no part of the identity at this default, so that what was made before
    the field was there keeps its key."""
    return Field(default, json_schema_extra={"later": True}, **more)


def environment(default: Any, **more: Any) -> Any:
    """An execution field that may change a result within rounding, as versions and processors do."""
    return Field(default, json_schema_extra={"execution": True, "environment": True}, **more)
