"""Measures how compatible model versions are, from features and labels only, without training."""

from .agreement import topk_agreement
from .backfill import BackfillCurve, backfill_curve, mixed_topk
from .criteria import (
    CompatibilityTable,
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatibility_table,
    compatibility_tax,
    forward_compatibility,
    negative_flip_rate,
    positive_flip_rate,
)
from .gate import DEFAULT_RULES, GateResult, Outcome, Rule, upgrade_gate
from .inequalities import Violations, inequality_violations
from .matrix import compatibility_hits, compatibility_matrix
from .orders import farthest_from_class_mean, lowest_margin
from .pairs import PairReport, VersionPairs, compare_pairs
from .regressions import Regression, worst_regressions
from .statistics import (
    Interval,
    McNemar,
    bootstrap_cells,
    bootstrap_gain,
    bootstrap_interval,
    exact_interval,
    mcnemar_test,
    mcnemar_tests,
    randomization_test,
)
from .thresholds import Calibration, ThresholdMove, calibrate_scores, upgrade_threshold

__all__ = [
    "DEFAULT_RULES",
    "BackfillCurve",
    "Calibration",
    "CompatibilityTable",
    "GateResult",
    "Interval",
    "McNemar",
    "Outcome",
    "PairReport",
    "Regression",
    "Rule",
    "ThresholdMove",
    "VersionPairs",
    "Violations",
    "average_accuracy",
    "average_compatibility",
    "backfill_curve",
    "backward_compatibility",
    "bootstrap_cells",
    "bootstrap_gain",
    "bootstrap_interval",
    "calibrate_scores",
    "compare_pairs",
    "compatibility_hits",
    "compatibility_matrix",
    "compatibility_table",
    "compatibility_tax",
    "exact_interval",
    "farthest_from_class_mean",
    "forward_compatibility",
    "inequality_violations",
    "lowest_margin",
    "mcnemar_test",
    "mcnemar_tests",
    "mixed_topk",
    "negative_flip_rate",
    "positive_flip_rate",
    "randomization_test",
    "topk_agreement",
    "upgrade_gate",
    "upgrade_threshold",
    "worst_regressions",
]
