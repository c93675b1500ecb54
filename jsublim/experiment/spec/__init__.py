"""What an experiment's YAML may say, a file a section."""

from jsublim.experiment.spec.base import Config
from jsublim.experiment.spec.experiment import Experiment
from jsublim.experiment.spec.loading import check_config, find_config, load_experiment, read_config, read_students
from jsublim.experiment.spec.recipe import Recipe
from jsublim.experiment.spec.students import Students, variants
from jsublim.experiment.spec.teachers import Taught, Teachers

__all__ = [
    "Config",
    "Experiment",
    "Recipe",
    "Students",
    "Taught",
    "Teachers",
    "check_config",
    "find_config",
    "load_experiment",
    "read_config",
    "read_students",
    "variants",
]
