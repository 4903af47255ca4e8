"""What a check of `doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. `hint` says what to do about it."""

    name: str
    status: Status
    message: str
    hint: str = ""
