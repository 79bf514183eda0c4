"""StableLM: norms that take off the mean and add a bias."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("stablelm", missing_feature="norms that take off the mean and add a bias")
