"""Pages drawn from the JSON that a run writes, and from nothing else."""

from moefy.report.pages import conversion_page, model_card, report_page, score_rows, shape_text

__all__ = ["conversion_page", "model_card", "report_page", "score_rows", "shape_text"]
