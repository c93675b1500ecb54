"""Changes of rows between the teacher and the student: one file per change. A transform leaves the rows it was given
as they were. A row whose text may have changed comes out without its divergence positions: they must be found anew.
"""

from jsublim.transforms import aligned, audited, entangled, mixing, numbers, paraphrase, templates
from jsublim.transforms.change import CHANGES, Change, ChangeContext, Changed, ChangeRun

__all__ = [
    "CHANGES",
    "Change",
    "ChangeContext",
    "ChangeRun",
    "Changed",
    "aligned",
    "audited",
    "entangled",
    "mixing",
    "numbers",
    "paraphrase",
    "templates",
]
