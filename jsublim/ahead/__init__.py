"""Programs compiled for TPUs that are not there: whether each stage of an experiment fits, how chips communicate, and which layout
should be fastest.

The compiler that comes with `jax[tpu]` needs no TPU. It shows memory and communication, never speed.
"""
