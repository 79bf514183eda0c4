"""IQuest-Coder: Llama under a name of its own."""

from __future__ import annotations

import dataclasses

from moefy.models.families import llama

FAMILY = dataclasses.replace(llama.FAMILY, model_type="iquestcoder")
