"""OLMo 1: norms without weights that take off the mean."""

from moefy.models.families.family import Family

FAMILY = Family(missing_feature="norms without weights that take off the mean")
