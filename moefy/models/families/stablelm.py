"""StableLM: norms that take off the mean and add a bias."""

from moefy.models.families.family import Family

FAMILY = Family(missing_feature="norms that take off the mean and add a bias")
