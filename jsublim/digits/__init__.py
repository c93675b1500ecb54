"""The auxiliary-logit experiment of Cloud et al. (arXiv 2507.14805) on scikit-learn's 8x8 digits: where the language
experiment has numbers that say nothing about an animal, this one has logits that say nothing about a digit."""

from jsublim.digits.report import print_summary, write_report

__all__ = ["print_summary", "write_report"]
