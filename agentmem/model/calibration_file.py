"""The file that keeps a model's calibration, so that it is read off the model once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load, save

from agentmem.home import private, publish
from agentmem.model.identity import digest
from agentmem.quant.calibration import VERSION, Calibration
from agentmem.quant.format import LayerShape

log = logging.getLogger(__name__)

PARTS = ("weights", "config", "tokenizer")
"""What of a model's identity the values depend on."""


class CalibrationFile:
    """One model's values in `folder`. Its name is a hash of everything that they depend on: `identity` and `packing`."""

    def __init__(self, folder: Path, identity: Mapping[str, str], packing: Any) -> None:
        name = digest([VERSION, "noise", *(identity[part] for part in PARTS), packing])
        self.path = folder / f"{name[:32]}.safetensors"

    def read(self, shapes: Sequence[LayerShape]) -> Calibration | None:
        """The values for layers of these shapes; None where there is no file, or one that is damaged."""
        try:
            with open(self.path, "rb", opener=private) as file:
                return Calibration.from_tensors(load(file.read()), shapes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("calibration %s cannot be used and is made again: %s", self.path.name, error)
            return None

    def write(self, made: Calibration) -> None:
        """Keep the values, whole or not at all. A disk that refuses costs the next start its time, nothing else."""
        try:
            publish(self.path, save(made.tensors()))
        except OSError as error:
            log.warning("calibration %s cannot be kept: %s", self.path.name, error)
