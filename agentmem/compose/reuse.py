"""What an agent or a request lets prompts use of remembered state. No MLX in here."""

from __future__ import annotations

from typing import Literal, get_args

Reuse = Literal["exact", "composed", "auto", "off"]
"""`exact`: the same tokens behind the same left context. `composed`: also segments that stood behind another one, whenever the
planner has what it needs. `auto`: those too, where it has been measured how well that goes. `off`: nothing."""
Planner = Literal["kvcomm+tail", "kvcomm", "lego", "blend", "paper"]
"""How a prompt is composed: by anchors, and its end is read; by anchors alone; moved, and the first tokens of each text read;
moved, and the tokens read anew whose values differ most; by anchors as KVCOMM's paper has it, which asks for anchors
that are kept in its way."""
PLANNERS: tuple[Planner, ...] = get_args(Planner)
DEFAULT = PLANNERS[0]
REUSES: tuple[Reuse, ...] = get_args(Reuse)
