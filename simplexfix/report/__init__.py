"""Evaluation reports of model versions, as JSON, figures and one HTML page."""

from .evaluation import Counts, Criteria, EvaluationReport, Ignored, QueriesInGallery, Upgrade, evaluate
from .verdict import Verdict

__all__ = [
    "Counts",
    "Criteria",
    "EvaluationReport",
    "Ignored",
    "QueriesInGallery",
    "Upgrade",
    "Verdict",
    "evaluate",
]
