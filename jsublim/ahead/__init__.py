"""Programs compiled for TPUs and GPUs that are not there: whether each stage of an experiment fits, how chips communicate, and which
layout should be fastest.

XLA's compilers need no TPU and no GPU. They show memory and communication, never speed.
"""
