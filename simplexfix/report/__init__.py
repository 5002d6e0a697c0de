"""Reports: everything measured of model versions at once, as JSON, figures and one page of HTML."""

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
