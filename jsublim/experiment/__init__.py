"""An experiment: what a YAML may say, the stages it becomes, the artifacts they leave."""
