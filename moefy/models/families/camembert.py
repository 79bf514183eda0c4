"""CamemBERT: RoBERTa for French."""

from __future__ import annotations

import dataclasses

from moefy.models.families import roberta

FAMILY = dataclasses.replace(roberta.FAMILY, model_type="camembert")
