"""The stages of an experiment, one file each: what is computed, and what that costs. Who gets which is `experiment.py`'s."""

from jsublim.pipeline.stages.attribution import attribute
from jsublim.pipeline.stages.audit import audit_rows
from jsublim.pipeline.stages.datasets import change_rows, score_numbers
from jsublim.pipeline.stages.divergence import mark_divergence
from jsublim.pipeline.stages.evaluations import evaluate_models
from jsublim.pipeline.stages.rows import sample_rows
from jsublim.pipeline.stages.scan import scan_rows
from jsublim.pipeline.stages.starts import score_rows
from jsublim.pipeline.stages.students import Lesson, train_students
from jsublim.pipeline.stages.targets import store_targets
from jsublim.pipeline.stages.teachers import contrast_teacher, train_teachers

__all__ = [
    "Lesson",
    "attribute",
    "audit_rows",
    "change_rows",
    "contrast_teacher",
    "evaluate_models",
    "mark_divergence",
    "sample_rows",
    "scan_rows",
    "score_numbers",
    "score_rows",
    "store_targets",
    "train_students",
    "train_teachers",
]
