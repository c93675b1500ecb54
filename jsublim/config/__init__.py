"""What an experiment's YAML may say: one file per section. Each field says what it decides (`jsublim.core.section`)."""

from jsublim.config.data import Data, Dataset, RowSampling, Scoring
from jsublim.config.experiment import Config, Experiment
from jsublim.config.loading import check_config, load_experiment, read_config
from jsublim.config.recipe import Recipe
from jsublim.config.shipped import find_config
from jsublim.config.students import Students, elders, variants
from jsublim.config.teachers import Taught, Teachers

__all__ = [
    "Config",
    "Data",
    "Dataset",
    "Experiment",
    "Recipe",
    "RowSampling",
    "Scoring",
    "Students",
    "Taught",
    "Teachers",
    "check_config",
    "elders",
    "find_config",
    "load_experiment",
    "read_config",
    "variants",
]
