"""The families that there are, by name."""

from __future__ import annotations

from trainer.families.family import Config, Family
from trainer.families.sd3 import SD3
from trainer.families.sd15 import SD15
from trainer.families.sdxl import SDXL

FAMILIES = {family.name: family for family in (SDXL, SD15, SD3)}


def family_of(index: Config) -> Family:
    """The family of a pipeline, by its model_index.json."""
    kind = index.get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline.__name__ == kind:
            return family
    known = ", ".join(family.pipeline.__name__ for family in FAMILIES.values())
    raise ValueError(f"it is a {kind}; need one of {known}")
