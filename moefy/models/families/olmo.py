"""OLMo 1: norms without weights that take off the mean."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("olmo", missing_feature="norms without weights that take off the mean")
