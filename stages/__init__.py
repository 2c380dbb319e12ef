"""One file per DVC stage: read its params, call pipeline, write its outs."""

from pipeline.cpu import set_up_cpu
from pipeline.warm import hand_over

hand_over()
set_up_cpu()
