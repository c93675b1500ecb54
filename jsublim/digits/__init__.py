"""The auxiliary-logit experiment of Cloud et al. (arXiv 2507.14805) on scikit-learn's 8x8 digits: where the language
experiment has numbers that say nothing about an animal, this one has logits that say nothing about a digit."""
