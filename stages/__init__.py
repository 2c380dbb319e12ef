"""One file per DVC stage: read its params, call pipeline, write its outs."""

from pipeline.warm import hand_over, share_cores

hand_over()
share_cores()
